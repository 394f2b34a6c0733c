//! The manifest of a family, whichever of its two forms it has, as one typed list.

use std::fs;
use std::path::{Path, PathBuf};

use mp_train::checkpoint::{Dtype, TensorInfo};
use serde_json::{Map, Value};

use super::Outcome;

/// Where a family's manifest stands and what its entries look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `cases/manifest.json`, tensors by name, adapters named in a sentence: chatglm-6b.
    Named,
    /// `manifest.json`, a list of tensors and of patterns `lead.*`, adapters by folder: chatglm2-6b and
    /// glm-4-9b.
    Listed,
}

/// What a tensor of a case is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Input,
    Expected,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::Input => "input",
            Role::Expected => "expected tensor",
        })
    }
}

/// One tensor, or all whose names start alike.
pub struct Line {
    /// A name, or `lead.*`.
    pub name: String,
    /// Nothing for a word that is not known.
    pub role: Option<Role>,
    dtype: String,
    shapes: Vec<Vec<usize>>,
    /// How many tensors it stands for.
    pub count: usize,
    /// How far the reference is from the same computation in float64, where that is said.
    pub float64_gap: Option<f64>,
}

impl Line {
    pub fn covers(&self, tensor: &str) -> bool {
        match self.name.strip_suffix('*') {
            Some(lead) => tensor.starts_with(lead),
            None => self.name == tensor,
        }
    }

    /// Whether a tensor is of the type and of a shape that is said.
    pub fn describes(&self, tensor: &str, info: &TensorInfo) -> bool {
        let dtype = match &self.dtype[..] {
            "int64" => Dtype::I64.to_string(),
            // The codes; their scales, under the same pattern, are halves.
            "int8" if tensor.ends_with("_scale") => Dtype::F16.to_string(),
            "int8" => Dtype::I8.to_string(),
            "float32" => Dtype::F32.to_string(),
            "float16" => Dtype::F16.to_string(),
            "bfloat16" => Dtype::Bf16.to_string(),
            other => other.to_owned(),
        };
        info.dtype.to_string() == dtype && self.shapes.contains(&info.shape)
    }
}

/// One case.
pub struct Entry {
    pub name: String,
    pub file: PathBuf,
    /// How it was run: `hyper_parameters` or `run`.
    pub settings: Value,
    /// Folders of adapters and prefixes.
    pub folders: Vec<PathBuf>,
    pub lines: Vec<Line>,
}

pub struct Manifest {
    pub form: Form,
    /// The factor on the residual, where there is one.
    pub residual_alpha: Option<f64>,
    pub entries: Vec<Entry>,
}

impl Manifest {
    pub fn read(folder: &Path) -> Outcome<Manifest> {
        let (listed, named) = (
            folder.join("manifest.json"),
            folder.join("cases/manifest.json"),
        );
        let (form, path) = match listed.exists() {
            true => (Form::Listed, listed),
            false => (Form::Named, named),
        };
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        // Python writes a gap between things that were not compared so; JSON has no such number.
        let text = text.replace("\"float64_gap\": NaN", "\"float64_gap\": null");
        let manifest: Map<String, Value> = serde_json::from_str(&text)?;
        let cases = manifest["cases"].as_object().ok_or("no list of cases")?;
        let entries = cases
            .iter()
            .map(|(name, entry)| read_entry(form, folder, name, entry));
        Ok(Manifest {
            form,
            residual_alpha: manifest.get("residual_alpha").and_then(Value::as_f64),
            entries: entries.collect::<Outcome<_>>()?,
        })
    }
}

fn read_entry(form: Form, folder: &Path, name: &str, entry: &Value) -> Outcome<Entry> {
    let text = |key: &str| entry[key].as_str().ok_or(format!("{name}: no `{key}`"));
    let role = |said: &Value| match said["role"].as_str() {
        Some("input") => Some(Role::Input),
        Some("expected") => Some(Role::Expected),
        _ => None,
    };
    let line = |tensor: &str, said: &Value, shapes| -> Outcome<Line> {
        Ok(Line {
            name: tensor.to_owned(),
            role: role(said),
            dtype: said["dtype"].as_str().unwrap_or_default().to_owned(),
            shapes,
            count: serde_json::from_value(said.get("count").unwrap_or(&1.into()).clone())?,
            float64_gap: said["float64_gap"].as_f64(),
        })
    };
    let (settings, folders, lines) = match form {
        Form::Named => {
            // "model/ + adapter_lora_qkv/", "model/ (+ ptuning_checkpoint/ for ptuning.*)"
            let words = text("weights")?.split(|c: char| c.is_whitespace() || "()".contains(c));
            let folders = words.filter(|word| word.ends_with('/') && *word != "model/");
            let tensors = entry["tensors"].as_object().ok_or("no `tensors`")?;
            let lines = tensors.iter().map(|(tensor, said)| {
                let shape = serde_json::from_value(said["shape"].clone())?;
                line(tensor, said, vec![shape])
            });
            let settings = entry["hyper_parameters"].clone();
            let folders: Vec<&str> = folders.collect();
            (settings, folders, lines.collect::<Outcome<_>>()?)
        }
        Form::Listed => {
            let settings = entry["run"].clone();
            let keys = ["adapter", "prefix", "start"];
            let folders = keys.iter().filter_map(|key| entry["run"][key].as_str());
            let tensors = entry["tensors"].as_array().ok_or("no `tensors`")?;
            let lines = tensors.iter().map(|said| {
                let shapes = match said.get("shapes") {
                    Some(shapes) => serde_json::from_value(shapes.clone())?,
                    None => vec![serde_json::from_value(said["shape"].clone())?],
                };
                line(said["name"].as_str().ok_or("no name")?, said, shapes)
            });
            let folders: Vec<&str> = folders.collect();
            (settings, folders, lines.collect::<Outcome<_>>()?)
        }
    };
    Ok(Entry {
        name: name.to_owned(),
        file: folder.join(text("file")?),
        settings,
        folders: folders.iter().map(|name| folder.join(name)).collect(),
        lines,
    })
}
