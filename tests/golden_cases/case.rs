//! The folder, its manifest, and the tensors of one case.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mp_train::checkpoint::safetensors::SafetensorsFile;
use mp_train::checkpoint::{HostTensor, ModelFolder, TensorSource};
use mp_train::config::model::ModelConfig;
use mp_train::config::run::ProductSums;
use mp_train::model::names::Names;
use mp_train::model::weights::{self, HeadSource};
use serde_json::Value;

use super::manifest::{Form, Manifest, Role};
use super::{Outcome, names};

/// One folder of reference cases.
pub struct Family {
    folder: PathBuf,
    manifest: Manifest,
    /// `config.json` of the model.
    pub config: ModelConfig,
    /// `model`, or another folder.
    model_name: String,
    /// Its tensors.
    pub model: Arc<dyn TensorSource>,
    /// Where embedding and head come from.
    pub head_source: HeadSource,
    /// What products of the linear layers are summed in, where the backend has a choice.
    pub product_sums: ProductSums,
    /// Folders that something was read from.
    opened: RefCell<BTreeSet<PathBuf>>,
}

/// The family's model in another folder: in other files, or under other names.
pub struct Variant {
    /// The folder's name.
    pub name: String,
    pub config: ModelConfig,
    pub source: Arc<dyn TensorSource>,
    pub head_source: HeadSource,
}

impl Variant {
    fn open(folder: &Path) -> Outcome<Variant> {
        let config = ModelConfig::from_json_file(&folder.join("config.json"))?;
        let source = ModelFolder::open(folder)?;
        let head_source = weights::check(&source, &config)?;
        Ok(Variant {
            name: folder.file_name().unwrap().to_string_lossy().into_owned(),
            config,
            source: Arc::new(source),
            head_source,
        })
    }
}

impl Family {
    pub fn open(folder: &Path) -> Outcome<Family> {
        let Variant {
            name,
            config,
            source,
            head_source,
        } = Variant::open(&folder.join("model"))?;
        Ok(Family {
            folder: folder.to_owned(),
            manifest: Manifest::read(folder)?,
            config,
            model_name: name,
            model: source,
            head_source,
            product_sums: ProductSums::F32,
            opened: RefCell::new(BTreeSet::from([folder.join("model"), folder.join("cases")])),
        })
    }

    /// The same cases with the model of another folder.
    pub fn with_model(&self, variant: &Variant) -> Outcome<Family> {
        Ok(Family {
            folder: self.folder.clone(),
            manifest: Manifest::read(&self.folder)?,
            config: variant.config.clone(),
            model_name: variant.name.clone(),
            model: Arc::clone(&variant.source),
            head_source: variant.head_source.clone(),
            product_sums: self.product_sums,
            opened: self.opened.clone(),
        })
    }

    /// The names of the cases, in the manifest's order.
    pub fn cases(&self) -> impl Iterator<Item = &str> {
        self.manifest.entries.iter().map(|entry| &entry.name[..])
    }

    pub fn form(&self) -> Form {
        self.manifest.form
    }

    /// The folder of the model.
    pub fn model_folder(&self) -> PathBuf {
        self.folder.join(&self.model_name)
    }

    /// A folder of the family, which counts as opened from now on.
    pub fn folder(&self, name: impl AsRef<Path>) -> PathBuf {
        let folder = self.folder.join(name);
        self.opened.borrow_mut().insert(folder.clone());
        folder
    }

    /// The same, where there is one of this name.
    pub fn folder_if_any(&self, name: impl AsRef<Path>) -> Option<PathBuf> {
        let name = name.as_ref();
        self.folder.join(name).exists().then(|| self.folder(name))
    }

    /// The other folders of the model, `model_*`.
    pub fn variants(&self) -> Outcome<Vec<Variant>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with("model_") {
                names.push(name);
            }
        }
        names.sort();
        let variants = names.iter().map(|name| Variant::open(&self.folder(name)));
        variants.collect()
    }

    /// The first thing in which a variant of the same names is not what `model/` is.
    pub fn difference(&self, variant: &Variant) -> Outcome<Option<String>> {
        if variant.config != self.config {
            return Ok(Some("config.json".to_owned()));
        }
        for name in self.model.names() {
            // Of a buffer that nothing reads, halves keep what they can.
            if name.ends_with("rotary_pos_emb.inv_freq") {
                continue;
            }
            let (a, b) = (self.model.read(&name)?, variant.source.read(&name)?);
            if a.shape != b.shape || a.to_f32()? != b.to_f32()? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// The factor on the residual, from the manifest; 1 where a manifest has none.
    pub fn residual_alpha(&self) -> f64 {
        self.manifest.residual_alpha.unwrap_or(1.0)
    }

    /// One matrix for embedding and head: the embedding's values, lm_head's are ignored.
    pub fn tied_to_embedding(&self) -> HeadSource {
        let embedding = Names::of(&self.config).word_embeddings;
        HeadSource {
            embedding,
            head: embedding,
            tied: true,
            warning: None,
        }
    }

    /// Opens a case and checks that its file holds what the manifest says.
    pub fn case(&self, name: &str) -> Outcome<Case> {
        let entries = &self.manifest.entries;
        let entry = entries.iter().find(|entry| entry.name == name);
        let entry = entry.ok_or("no case of this name")?;
        let source = SafetensorsFile::open(&entry.file)?;
        let mut tensors = BTreeMap::new();
        let mut counts = vec![0; entry.lines.len()];
        for stored in source.names() {
            let line = entry.lines.iter().position(|line| line.covers(&stored));
            let line = line.ok_or(format!("`{stored}` is not in the manifest"))?;
            counts[line] += 1;
            let line = &entry.lines[line];
            let info = source.info(&stored).ok_or("no such tensor")?;
            if !line.describes(&stored, &info) {
                return Err(format!("`{stored}` is not as the manifest says").into());
            }
            let known = names::known(self.form(), entry, &stored);
            let tensor = StoredTensor {
                role: line.role.ok_or(format!("`{stored}` has an unknown role"))?,
                float64_gap: line.float64_gap,
                stored,
            };
            if let Some(other) = tensors.insert(known, tensor) {
                return Err(format!("`{}` has the name of another", other.stored).into());
            }
        }
        for (line, count) in entry.lines.iter().zip(counts) {
            if line.count != count {
                return Err(format!("{count} tensors `{}`, not {}", line.name, line.count).into());
            }
        }
        for folder in &entry.folders {
            self.folder(folder);
        }
        Ok(Case {
            name: name.to_owned(),
            form: self.form(),
            settings: entry.settings.clone(),
            folders: entry.folders.clone(),
            source,
            tensors,
            read: RefCell::default(),
        })
    }

    /// Files of no case beside the cases, and folders that nothing was read from.
    pub fn untouched(&self) -> Outcome<Vec<String>> {
        let entries = self.manifest.entries.iter();
        let known: BTreeSet<_> = entries.map(|entry| entry.file.clone()).collect();
        let mut untouched = Vec::new();
        for entry in fs::read_dir(self.folder.join("cases"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "safetensors") && !known.contains(&path)
            {
                untouched.push(path.file_name().unwrap().to_string_lossy().into_owned());
            }
        }
        let mut folders = vec![self.folder.clone()];
        while let Some(folder) = folders.pop() {
            let mut has_files = false;
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                match path.is_dir() {
                    true => folders.push(path),
                    false => has_files = true,
                }
            }
            if has_files && folder != self.folder && !self.opened.borrow().contains(&folder) {
                let name = folder.strip_prefix(&self.folder)?;
                untouched.push(format!("{}/", name.display()));
            }
        }
        untouched.sort();
        Ok(untouched)
    }
}

/// A tensor of a case, by what its file and the manifest say.
struct StoredTensor {
    stored: String,
    role: Role,
    float64_gap: Option<f64>,
}

/// One case.
pub struct Case {
    /// As the manifest calls it.
    pub name: String,
    pub form: Form,
    /// How it was run, as the manifest has it.
    pub settings: Value,
    /// The folders of adapters and prefixes that the case names.
    pub folders: Vec<PathBuf>,
    source: SafetensorsFile,
    /// By the names that the harness has for them.
    tensors: BTreeMap<String, StoredTensor>,
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
        let listed = self.tensors.get(name).filter(|tensor| tensor.role == role);
        let listed = listed.ok_or(format!("no {role} `{name}`"))?;
        self.read.borrow_mut().insert(name.to_owned());
        Ok(self.source.read(&listed.stored)?)
    }

    /// An integer input and its shape.
    pub fn input(&self, name: &str) -> Outcome<(Vec<usize>, Vec<i64>)> {
        let tensor = self.tensor(name, Role::Input)?;
        Ok((tensor.shape.clone(), tensor.to_i64()?))
    }

    /// An integer input that not every case has.
    pub fn input_if_any(&self, name: &str) -> Outcome<Option<(Vec<usize>, Vec<i64>)>> {
        match self.has(name) {
            true => Ok(Some(self.input(name)?)),
            false => Ok(None),
        }
    }

    /// A floating-point input.
    pub fn input_values(&self, name: &str) -> Outcome<HostTensor> {
        self.tensor(name, Role::Input)
    }

    /// An expected tensor; reading it counts as comparing it.
    pub fn expected(&self, name: &str) -> Outcome<Tensor> {
        Tensor::new(&self.tensor(name, Role::Expected)?)
    }

    /// How far the reference itself is off, where the manifest says so.
    pub fn float64_gap(&self, name: &str) -> Option<f64> {
        self.tensors.get(name)?.float64_gap
    }

    /// Whether the case has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether the case expects a tensor of this name.
    pub fn expects(&self, name: &str) -> bool {
        let tensor = self.tensors.get(name);
        tensor.is_some_and(|tensor| tensor.role == Role::Expected)
    }

    fn names(&self, role: Role) -> impl Iterator<Item = &str> {
        let tensors = self.tensors.iter();
        let of_role = tensors.filter(move |(_, tensor)| tensor.role == role);
        of_role.map(|(name, _)| name.as_str())
    }

    /// The names of all expected tensors.
    pub fn expected_names(&self) -> impl Iterator<Item = &str> {
        self.names(Role::Expected)
    }

    /// The names of all inputs that start so.
    pub fn inputs_under<'a>(&'a self, lead: &'a str) -> impl Iterator<Item = &'a str> {
        let inputs = self.names(Role::Input);
        inputs.filter(move |name| name.starts_with(lead))
    }

    /// What no procedure has looked at.
    pub fn unread(&self) -> Vec<(String, Role)> {
        let read = self.read.borrow();
        let unread = self
            .tensors
            .iter()
            .filter(|(name, _)| !read.contains(*name));
        unread
            .map(|(_, tensor)| (tensor.stored.clone(), tensor.role))
            .collect()
    }

    /// A setting of the run.
    pub fn hyper<T: serde::de::DeserializeOwned>(&self, key: &str) -> Outcome<T> {
        setting(&self.settings, key)
    }

    /// The only adapter folder of the case.
    pub fn folder(&self) -> Outcome<&Path> {
        match &self.folders[..] {
            [folder] => Ok(folder),
            folders => Err(format!("one adapter folder expected, not {folders:?}").into()),
        }
    }
}

/// An entry of a case's settings.
pub fn setting<T: serde::de::DeserializeOwned>(settings: &Value, key: &str) -> Outcome<T> {
    let value = &settings[key];
    let read = serde_json::from_value(value.clone());
    Ok(read.map_err(|error| format!("`{key}` is {value}: {error}"))?)
}
