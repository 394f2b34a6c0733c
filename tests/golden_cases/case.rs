//! The folder, its manifest, and the tensors of one case.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mp_train::checkpoint::safetensors::SafetensorsFile;
use mp_train::checkpoint::{HostTensor, ModelFolder, TensorSource};
use mp_train::config::model::ModelConfig;
use mp_train::model::names::Names;
use mp_train::model::weights::{self, HeadSource};
use serde_json::{Map, Value};

use super::Outcome;

/// One folder of reference cases.
pub struct Family {
    folder: PathBuf,
    manifest: Map<String, Value>,
    /// `model/config.json`.
    pub config: ModelConfig,
    /// `model/`.
    pub model: Arc<dyn TensorSource>,
    /// Where embedding and head come from.
    pub head_source: HeadSource,
    /// The names of the cases, in the manifest's order.
    pub cases: Vec<String>,
}

impl Family {
    pub fn open(folder: &Path) -> Outcome<Family> {
        let path = folder.join("cases/manifest.json");
        let text = fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let manifest: Map<String, Value> = serde_json::from_str(&text)?;
        let cases = manifest["cases"].as_object().ok_or("no list of cases")?;
        let config = ModelConfig::from_json_file(&folder.join("model/config.json"))?;
        let model = ModelFolder::open(&folder.join("model"))?;
        let head_source = weights::check(&model, &config)?;
        Ok(Family {
            cases: cases.keys().cloned().collect(),
            folder: folder.to_owned(),
            model: Arc::new(model),
            head_source,
            config,
            manifest,
        })
    }

    /// `model/`.
    pub fn model_folder(&self) -> PathBuf {
        self.folder.join("model")
    }

    /// The first tensor in which `model_bin/` is not what `model/` is; `None` also without the folder.
    pub fn model_bin_difference(&self) -> Outcome<Option<String>> {
        let folder = self.folder.join("model_bin");
        if !folder.exists() {
            return Ok(None);
        }
        let other = ModelFolder::open(&folder)?;
        if ModelConfig::from_json_file(&folder.join("config.json"))? != self.config {
            return Ok(Some("config.json".to_owned()));
        }
        weights::check(&other, &self.config)?;
        for name in self.model.names() {
            let (a, b) = (self.model.read(&name)?, other.read(&name)?);
            if a.shape != b.shape || a.to_f32()? != b.to_f32()? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The factor on the residual, from the manifest.
    pub fn residual_alpha(&self) -> Outcome<f64> {
        let alpha = self.manifest["residual_alpha"].as_f64();
        Ok(alpha.ok_or("the manifest has no residual_alpha")?)
    }

    /// One matrix for embedding and head: the embedding's values, lm_head's are ignored.
    pub fn tied_to_embedding(&self) -> HeadSource {
        let names = Names::of(&self.config);
        HeadSource {
            embedding: names.word_embeddings,
            head: names.word_embeddings,
            tied: true,
            warning: None,
        }
    }

    /// Opens a case and checks that its file holds what the manifest says.
    pub fn case(&self, name: &str) -> Outcome<Case> {
        let entry = self.manifest["cases"].get(name);
        let entry = entry.ok_or("no case of this name")?;
        let text = |key: &str| entry[key].as_str().ok_or(format!("no `{key}`"));
        let source = SafetensorsFile::open(&self.folder.join(text("file")?))?;
        let listed = entry["tensors"].as_object().ok_or("no `tensors`")?;
        let mut roles = BTreeMap::new();
        for (tensor, said) in listed {
            let info = source.info(tensor).ok_or(format!("no tensor `{tensor}`"))?;
            let shape: Vec<usize> = serde_json::from_value(said["shape"].clone())?;
            if info.shape != shape || info.dtype.to_string() != said["dtype"] {
                return Err(format!("`{tensor}` is not as the manifest says").into());
            }
            let role = match said["role"].as_str() {
                Some("input") => Role::Input,
                Some("expected") => Role::Expected,
                role => return Err(format!("`{tensor}` has the unknown role {role:?}").into()),
            };
            roles.insert(tensor.clone(), role);
        }
        if let Some(stray) = source
            .names()
            .iter()
            .find(|name| !roles.contains_key(*name))
        {
            return Err(format!("`{stray}` is not in the manifest").into());
        }
        // "model/ + adapter_lora_qkv/", "model/ (+ ptuning_checkpoint/ for ptuning.*)"
        let words = text("weights")?.split(|c: char| c.is_whitespace() || "()".contains(c));
        let folders = words.filter(|word| word.ends_with('/') && *word != "model/");
        Ok(Case {
            name: name.to_owned(),
            hyper_parameters: entry["hyper_parameters"].clone(),
            folders: folders.map(|word| self.folder.join(word)).collect(),
            source,
            roles,
            read: RefCell::default(),
        })
    }

    /// Files beside the manifest that belong to no case.
    pub fn stray_files(&self) -> Outcome<Vec<String>> {
        let cases = self.manifest["cases"].as_object().into_iter().flatten();
        let known: BTreeSet<_> = cases
            .filter_map(|(_, case)| Some(self.folder.join(case["file"].as_str()?)))
            .collect();
        let mut stray = Vec::new();
        for entry in fs::read_dir(self.folder.join("cases"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "safetensors") && !known.contains(&path)
            {
                stray.push(path.file_name().unwrap().to_string_lossy().into_owned());
            }
        }
        stray.sort();
        Ok(stray)
    }
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

/// One case.
pub struct Case {
    /// As the manifest calls it.
    pub name: String,
    /// As the manifest has them.
    pub hyper_parameters: Value,
    /// The folders of adapters and prefixes that the case names.
    pub folders: Vec<PathBuf>,
    source: SafetensorsFile,
    roles: BTreeMap<String, Role>,
    read: RefCell<BTreeSet<String>>,
}

/// A tensor widened to f64, which holds all ids, codes and f32 values exactly.
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f64>,
}

impl Tensor {
    fn new(tensor: &HostTensor) -> Outcome<Tensor> {
        let values = match tensor.dtype.is_float() {
            true => tensor.to_f32()?.into_iter().map(f64::from).collect(),
            false => tensor.to_i64()?.into_iter().map(|v| v as f64).collect(),
        };
        Ok(Tensor {
            shape: tensor.shape.clone(),
            values,
        })
    }

    /// The largest absolute value.
    pub fn largest(&self) -> f64 {
        let sizes = self.values.iter().map(|value| value.abs());
        sizes.fold(0.0, f64::max)
    }
}

impl Case {
    fn tensor(&self, name: &str, role: Role) -> Outcome<HostTensor> {
        if self.roles.get(name) != Some(&role) {
            return Err(format!("no {role} `{name}`").into());
        }
        self.read.borrow_mut().insert(name.to_owned());
        Ok(self.source.read(name)?)
    }

    /// An integer input and its shape.
    pub fn input(&self, name: &str) -> Outcome<(Vec<usize>, Vec<i64>)> {
        let tensor = self.tensor(name, Role::Input)?;
        Ok((tensor.shape.clone(), tensor.to_i64()?))
    }

    /// A floating-point input.
    pub fn input_values(&self, name: &str) -> Outcome<Vec<f32>> {
        Ok(self.tensor(name, Role::Input)?.to_f32()?)
    }

    /// An expected tensor; reading it counts as comparing it.
    pub fn expected(&self, name: &str) -> Outcome<Tensor> {
        Tensor::new(&self.tensor(name, Role::Expected)?)
    }

    /// Whether the case has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.roles.contains_key(name)
    }

    /// Whether the case expects a tensor of this name.
    pub fn expects(&self, name: &str) -> bool {
        self.roles.get(name) == Some(&Role::Expected)
    }

    /// The names of all expected tensors.
    pub fn expected_names(&self) -> impl Iterator<Item = &str> {
        let expected = self
            .roles
            .iter()
            .filter(|(_, role)| **role == Role::Expected);
        expected.map(|(name, _)| name.as_str())
    }

    /// The names of all inputs that start so.
    pub fn inputs_under<'a>(&'a self, lead: &'a str) -> impl Iterator<Item = &'a str> {
        let inputs = self.roles.iter().filter(|(_, role)| **role == Role::Input);
        inputs
            .map(|(name, _)| name.as_str())
            .filter(move |name| name.starts_with(lead))
    }

    /// What no procedure has looked at.
    pub fn unread(&self) -> Vec<(String, Role)> {
        let read = self.read.borrow();
        let unread = self.roles.iter().filter(|(name, _)| !read.contains(*name));
        unread.map(|(name, role)| (name.clone(), *role)).collect()
    }

    /// A hyper-parameter.
    pub fn hyper<T: serde::de::DeserializeOwned>(&self, key: &str) -> Outcome<T> {
        let value = &self.hyper_parameters[key];
        let read = serde_json::from_value(value.clone());
        Ok(read.map_err(|error| format!("hyper_parameters.{key} is {value}: {error}"))?)
    }

    /// The only adapter folder of the case.
    pub fn folder(&self) -> Outcome<&Path> {
        match &self.folders[..] {
            [folder] => Ok(folder),
            folders => Err(format!("one adapter folder expected, not {folders:?}").into()),
        }
    }
}
