//! A whole model as a Hugging Face folder, tensor by tensor from file to file.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use serde_json::{Map, Value};

use super::folder::NewFolder;
use super::rows::{self, Delta, Rows};
use super::{CONFIG_FILE, ExportError, ExportOptions, Exported, settings, shards};
use crate::checkpoint::run_state::write_json;
use crate::checkpoint::safetensors::{PlannedTensor, TensorSink, stream_safetensors};
use crate::checkpoint::{CheckpointError, Dtype, ModelFolder, TensorSource};
use crate::config::architecture::Naming;
use crate::config::model::ModelConfig;
use crate::config::run::AdapterSection;
use crate::model::names::Names;
use crate::model::trainables::Trainables;
use crate::model::{quantised, weights};
use crate::quant::{Bits, QuantError, check_cols, quantise_row};

/// What a tensor of the new folder is made of.
enum Content {
    /// The tensor of this name as it is stored.
    Same,
    /// The weight of this name and shape, rounded to the element type.
    Values(Vec<usize>),
    /// The codes of the weight of this shape.
    Codes(Vec<usize>),
    /// The scales of this weight's codes.
    Scales(String, Vec<usize>),
}

/// The model and what is made of it.
struct Work<'a> {
    source: &'a dyn TensorSource,
    /// Codes of the folder.
    from: Option<Bits>,
    /// Codes of the new folder.
    to: Option<Bits>,
    deltas: &'a BTreeMap<String, Delta>,
    contents: BTreeMap<String, Content>,
}

/// Writes weights, `config.json` and what else belongs to the model into `folder`.
pub fn write(
    options: &ExportOptions,
    config: &ModelConfig,
    mut json: Map<String, Value>,
    adapter: Option<(&Path, &AdapterSection)>,
    folder: &NewFolder,
    stop: &AtomicBool,
) -> Result<Exported, ExportError> {
    let source = ModelFolder::open(&options.model)?;
    weights::check(&source, config)?;
    let deltas = match adapter {
        Some((path, section)) => rows::deltas(path, &Trainables::new(config, section, false)?)?,
        None => BTreeMap::new(),
    };
    let to = quantised::bits(options.quantization);
    if to.is_some() && config.architecture.naming == Naming::Glm {
        return Err(ExportError::NoLayoutOfCodes {
            model: options.model.clone(),
        });
    }
    let mut work = Work {
        source: &source,
        from: quantised::bits(config.quantization),
        to,
        deltas: &deltas,
        contents: BTreeMap::new(),
    };
    let tensors = work.plan(config, options.dtype.map(super::TorchDtype::dtype))?;
    let names = Names::of(config);
    let is_main = |tensor: &&PlannedTensor| {
        tensor.name == names.word_embeddings || tensor.name == names.lm_head
    };
    let dtype = tensors.iter().find(is_main).map(|tensor| tensor.dtype);
    settings::set(&mut json, dtype.unwrap_or(Dtype::F16), to);

    let exported = Exported {
        files: 0,
        tensors: tensors.len(),
        bytes: tensors.iter().map(shards::bytes).sum(),
        merged: deltas.len(),
        requantised: !deltas.is_empty() && (work.from.is_some() || to.is_some()),
    };
    let shards = shards::deal(tensors, options.max_shard_size);
    for (index, shard) in shards.iter().enumerate() {
        let path = folder.temporary().join(shards::name(index, shards.len()));
        stream_safetensors(&path, shard.clone(), |tensor, sink| {
            match stop.load(Ordering::Relaxed) {
                true => Err(ExportError::Interrupted),
                false => work.fill(tensor, sink),
            }
        })?;
    }
    shards::write_index(folder.temporary(), &shards)?;
    folder.copy_beside(&options.model)?;
    write_json(&folder.temporary().join(CONFIG_FILE), &json)?;
    Ok(Exported {
        files: shards.len(),
        ..exported
    })
}

impl Work<'_> {
    /// The tensors of the new folder in the order of the forward pass; buffers that nobody reads come
    /// last, as they are.
    fn plan(
        &mut self,
        config: &ModelConfig,
        asked: Option<Dtype>,
    ) -> Result<Vec<PlannedTensor>, ExportError> {
        let mut planned = Vec::new();
        let mut plan = |name: String, dtype, shape, content| {
            planned.push(PlannedTensor {
                name: name.clone(),
                dtype,
                shape,
            });
            self.contents.insert(name, content);
        };
        let mut rest: Vec<String> = self.source.names();
        for (name, shape) in weights::model_tensors(config) {
            let Some(info) = self.source.info(&name) else {
                // One of embedding and head, where they are one matrix.
                continue;
            };
            let scales = weights::scale_name(&name);
            rest.retain(|other| *other != name && *other != scales);
            match (self.to, &shape[..]) {
                (Some(bits), &[rows, cols]) if weights::is_block_matrix(config, &name, &shape) => {
                    check_cols(cols, bits).map_err(|reason| ExportError::Quantised {
                        tensor: name.clone(),
                        reason,
                    })?;
                    let same = self.from == self.to && !self.deltas.contains_key(&name);
                    let (codes, of_codes) = match same {
                        true => (Content::Same, Content::Same),
                        false => (
                            Content::Codes(shape.clone()),
                            Content::Scales(name.clone(), shape.clone()),
                        ),
                    };
                    plan(name, Dtype::I8, vec![rows, bits.row_bytes(cols)], codes);
                    plan(scales, Dtype::F16, vec![rows], of_codes);
                }
                _ => {
                    let dtype = match (self.to, asked, info.dtype) {
                        (Some(_), ..) => Dtype::F16,
                        (None, Some(asked), _) => asked,
                        // Codes of a folder are beside halves.
                        (None, None, Dtype::I8) => Dtype::F16,
                        (None, None, Dtype::F64) => Dtype::F32,
                        (None, None, found) => found,
                    };
                    plan(name, dtype, shape.clone(), Content::Values(shape));
                }
            }
        }
        for name in rest {
            if let Some(info) = self.source.info(&name) {
                plan(name, info.dtype, info.shape, Content::Same);
            }
        }
        Ok(planned)
    }

    /// Makes the elements of one tensor.
    fn fill(&self, tensor: &PlannedTensor, sink: &mut TensorSink<'_>) -> Result<(), ExportError> {
        match self.contents.get(&tensor.name) {
            None | Some(Content::Same) => {
                let same = self.source.read(&tensor.name)?;
                Ok(sink.write(&same.bytes)?)
            }
            Some(Content::Values(shape)) => {
                let mut rows = self.rows(&tensor.name, shape)?;
                let mut values = vec![0.0; rows.cols];
                let mut room = Rounded::new(tensor.dtype, rows.cols);
                for row in 0..rows.rows {
                    rows.read(row, &mut values)?;
                    room.round(&values).map_err(|value| ExportError::Range {
                        tensor: tensor.name.clone(),
                        row,
                        value,
                        dtype: tensor.dtype,
                        instead: "bfloat16 or float32",
                    })?;
                    sink.write(room.bytes())?;
                }
                Ok(())
            }
            Some(Content::Codes(shape)) => {
                let write = |codes: &[i8], _| sink.write(bytemuck::cast_slice(codes));
                self.quantise(&tensor.name, shape, write)
            }
            Some(Content::Scales(name, shape)) => {
                let write = |_: &[i8], scale: f16| sink.write(&scale.to_le_bytes());
                self.quantise(name, shape, write)
            }
        }
    }

    fn rows(&self, name: &str, shape: &[usize]) -> Result<Rows<'_>, ExportError> {
        Rows::open(self.source, name, shape, self.from, self.deltas.get(name))
    }

    /// Hands the codes and the scale of each row to `write`. As THUDM's `quantize()`, it starts from
    /// weights rounded to halves.
    fn quantise(
        &self,
        name: &str,
        shape: &[usize],
        mut write: impl FnMut(&[i8], f16) -> Result<(), CheckpointError>,
    ) -> Result<(), ExportError> {
        let Some(bits) = self.to else { return Ok(()) };
        let mut rows = self.rows(name, shape)?;
        let mut values = vec![0.0; rows.cols];
        let mut halves = vec![f16::ZERO; rows.cols];
        let mut codes = vec![0; bits.row_bytes(rows.cols)];
        for row in 0..rows.rows {
            rows.read(row, &mut values)?;
            halves.convert_from_f32_slice(&values);
            let scale =
                quantise_row(&mut codes, &halves, bits).map_err(|col| ExportError::Quantised {
                    tensor: name.to_owned(),
                    reason: QuantError::NotFinite { row, col },
                })?;
            write(&codes, scale)?;
        }
        Ok(())
    }
}

/// A row rounded to its element type.
enum Rounded {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Rounded {
    fn new(dtype: Dtype, len: usize) -> Self {
        match dtype {
            Dtype::F16 => Rounded::F16(vec![f16::ZERO; len]),
            Dtype::Bf16 => Rounded::Bf16(vec![bf16::ZERO; len]),
            _ => Rounded::F32(vec![0.0; len]),
        }
    }

    /// Rounds `values` once, to nearest even.
    ///
    /// # Errors
    /// The first value that is no finite number afterwards.
    fn round(&mut self, values: &[f32]) -> Result<(), f32> {
        let bad = match self {
            Rounded::F32(room) => {
                room.copy_from_slice(values);
                room.iter().position(|value| !value.is_finite())
            }
            Rounded::F16(room) => {
                room.convert_from_f32_slice(values);
                room.iter().position(|value| !value.is_finite())
            }
            Rounded::Bf16(room) => {
                room.convert_from_f32_slice(values);
                room.iter().position(|value| !value.is_finite())
            }
        };
        bad.map_or(Ok(()), |place| Err(values[place]))
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Rounded::F32(room) => bytemuck::cast_slice(room),
            Rounded::F16(room) => bytemuck::cast_slice(room),
            Rounded::Bf16(room) => bytemuck::cast_slice(room),
        }
    }
}
