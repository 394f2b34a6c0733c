//! P-Tuning v2 prefixes as THUDM's ptuning leaves them: the tensors `transformer.prefix_encoder.*` in
//! `pytorch_model.bin` and, in `config.json`, `pre_seq_len` and `prefix_projection`.
//!
//! Written are both `pytorch_model.bin`, which THUDM's code loads, and `prefix.safetensors`, which this
//! program reads where it is there.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::input_file::read_json;
use super::safetensors::{SafetensorsFile, write_safetensors};
use super::torch_zip::write_torch;
use super::{CheckpointError, HostTensor, ModelFolder, TensorSource, durable};

const LEAD: &str = "transformer.prefix_encoder.";
const BARE_LEAD: &str = "prefix_encoder.";
const PREFIX_FILE: &str = "prefix.safetensors";
const TORCH_FILE: &str = "pytorch_model.bin";
const CONFIG_FILE: &str = "config.json";

/// A prefix checkpoint in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefixFiles {
    /// The number of prefix positions.
    pub pre_seq_len: usize,
    /// Whether the prefix passes through two linear layers, which are then among the tensors.
    pub prefix_projection: bool,
    /// `transformer.prefix_encoder.embedding.weight`, `[pre_seq_len, 2 * layers * kv_width]` without
    /// projection and `[pre_seq_len, hidden]` with it; then also `...trans.{0,2}.{weight,bias}`.
    pub tensors: BTreeMap<String, HostTensor>,
    /// Tensors of the same files that belong to no prefix and were not read; nothing when writing.
    pub ignored: Vec<String>,
}

impl PrefixFiles {
    /// Reads a prefix folder: `prefix.safetensors`, or weights under the names of a model folder.
    ///
    /// Other tensors in the files are left alone and listed in `ignored`. `config.json` may be absent;
    /// the tensors say all of it.
    ///
    /// # Errors
    /// A file is missing or damaged, there is no prefix in it, or the tensors do not fit together or
    /// contradict `config.json`.
    pub fn read(folder: &Path) -> Result<Self, CheckpointError> {
        if !folder.is_dir() {
            return Err(CheckpointError::NotAFolder {
                path: folder.to_owned(),
                wanted: "a P-Tuning v2 checkpoint folder",
            });
        }
        let source = open_source(folder)?;
        let mut tensors = BTreeMap::new();
        let mut ignored = Vec::new();
        for name in source.names() {
            let Some(rest) = name
                .strip_prefix(LEAD)
                .or_else(|| name.strip_prefix(BARE_LEAD))
            else {
                ignored.push(name);
                continue;
            };
            if tensors
                .insert(format!("{LEAD}{rest}"), source.read(&name)?)
                .is_some()
            {
                let reason =
                    format!("'{BARE_LEAD}{rest}' is there with and without 'transformer.'");
                return Err(CheckpointError::mismatch(folder, reason));
            }
        }
        let (pre_seq_len, prefix_projection) =
            check(&tensors).map_err(|reason| CheckpointError::mismatch(folder, reason))?;
        let files = Self {
            pre_seq_len,
            prefix_projection,
            tensors,
            ignored,
        };
        files.check_config(&folder.join(CONFIG_FILE))?;
        Ok(files)
    }

    /// Writes `prefix.safetensors`, the same as `pytorch_model.bin`, and a `config.json` of
    /// `base_config` with `pre_seq_len` and `prefix_projection` set, creating the folder if need be.
    ///
    /// # Errors
    /// The tensors do not fit together or contradict the two fields, or a file cannot be written.
    pub fn write(
        &self,
        folder: &Path,
        mut base_config: Map<String, Value>,
    ) -> Result<(), CheckpointError> {
        let found =
            check(&self.tensors).map_err(|reason| CheckpointError::mismatch(folder, reason))?;
        if found != (self.pre_seq_len, self.prefix_projection) {
            let reason = format!(
                "the tensors say (pre_seq_len, prefix_projection) = {found:?}, not {:?}",
                (self.pre_seq_len, self.prefix_projection)
            );
            return Err(CheckpointError::mismatch(folder, reason));
        }
        durable::create_folder(folder)?;
        write_safetensors(&folder.join(PREFIX_FILE), &self.tensors)?;
        write_torch(&folder.join(TORCH_FILE), &self.tensors)?;
        base_config.insert("pre_seq_len".to_owned(), json!(self.pre_seq_len));
        base_config.insert(
            "prefix_projection".to_owned(),
            json!(self.prefix_projection),
        );
        durable::write_json(&folder.join(CONFIG_FILE), &base_config)
    }

    fn check_config(&self, path: &Path) -> Result<(), CheckpointError> {
        if path.symlink_metadata().is_err() {
            return Ok(());
        }
        let config: Map<String, Value> = read_json(path)?;
        let facts = [
            ("pre_seq_len", json!(self.pre_seq_len)),
            ("prefix_projection", json!(self.prefix_projection)),
        ];
        for (field, ours) in facts {
            let said = config.get(field).unwrap_or(&Value::Null);
            if !said.is_null() && *said != ours {
                return Err(CheckpointError::Setting {
                    path: path.to_owned(),
                    field,
                    found: said.to_string(),
                    remedy: format!(
                        "The prefix tensors beside it say {ours}: use the config.json that belongs to them"
                    ),
                });
            }
        }
        Ok(())
    }
}

fn open_source(folder: &Path) -> Result<Box<dyn TensorSource>, CheckpointError> {
    let own = folder.join(PREFIX_FILE);
    if own.symlink_metadata().is_ok() {
        return Ok(Box::new(SafetensorsFile::open(&own)?));
    }
    match ModelFolder::open(folder) {
        Ok(source) => Ok(Box::new(source)),
        Err(CheckpointError::NoWeights { path, looked_for }) => Err(CheckpointError::NoWeights {
            path,
            looked_for: format!("{PREFIX_FILE}, {looked_for}"),
        }),
        Err(other) => Err(other),
    }
}

/// The length of the prefix and whether it is projected, from the tensors alone.
fn check(tensors: &BTreeMap<String, HostTensor>) -> Result<(usize, bool), String> {
    let shape = |rest: &str| {
        let name = format!("{LEAD}{rest}");
        match tensors.get(&name) {
            Some(tensor) if tensor.dtype.is_float() => Ok(tensor.shape.as_slice()),
            Some(tensor) => Err(format!("'{name}' has element type {}", tensor.dtype)),
            None => Err(format!("there is no tensor '{name}'")),
        }
    };
    let embedding = shape("embedding.weight")?;
    let &[pre_seq_len, width] = embedding else {
        return Err(format!("the prefix embedding has shape {embedding:?}"));
    };
    if pre_seq_len == 0 || width == 0 {
        return Err(format!("the prefix embedding is empty, {embedding:?}"));
    }
    let prefix_projection = tensors.len() > 1;
    if prefix_projection {
        let shapes = [
            shape("trans.0.weight")?,
            shape("trans.0.bias")?,
            shape("trans.2.weight")?,
            shape("trans.2.bias")?,
        ];
        let fits = match shapes {
            [&[inner, from], &[inner_bias], &[out, to], &[out_bias]] => {
                from == width && inner_bias == inner && to == inner && out_bias == out
            }
            _ => false,
        };
        if !fits || tensors.len() != 5 {
            return Err(format!(
                "the layers of the prefix projection do not fit each other: embedding {embedding:?}, \
                 trans.0 and trans.2 (weight, bias) {shapes:?}, {} tensors",
                tensors.len()
            ));
        }
    }
    Ok((pre_seq_len, prefix_projection))
}
