//! A folder of golden data: models, adapters, cases.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use serde_json::Value;

/// The most stages that the tests use, where there are blocks enough.
const MOST_STAGES: usize = 4;

/// A model family.
pub struct Family {
    root: PathBuf,
    manifest: Value,
    /// config.json of its model.
    pub config: Value,
}

/// One case of a family.
pub struct Case {
    pub name: String,
    /// What the manifest says about it.
    pub manifest: Value,
    pub tensors: BTreeMap<String, HostTensor>,
}

/// The family that `GOLDEN_DIR` names, by default the one in this repository.
pub fn family() -> &'static Family {
    static FAMILY: OnceLock<Family> = OnceLock::new();
    FAMILY.get_or_init(|| {
        let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b");
        let root = std::env::var_os("GOLDEN_DIR").map_or(own, PathBuf::from);
        let root = std::fs::canonicalize(&root).unwrap();
        let manifest = read_json(&root.join("cases/manifest.json"));
        let config = read_json(&root.join("model/config.json"));
        Family {
            root,
            manifest,
            config,
        }
    })
}

pub fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

impl Family {
    pub fn path(&self, rest: &str) -> PathBuf {
        self.root.join(rest)
    }

    pub fn number(&self, key: &str) -> usize {
        self.config[key].as_u64().unwrap() as usize
    }

    pub fn blocks(&self) -> usize {
        self.number("num_layers")
    }

    pub fn most_stages(&self) -> usize {
        self.blocks().min(MOST_STAGES)
    }

    /// Names of the cases that hold a training run.
    pub fn training_cases(&self) -> Vec<String> {
        let cases = self.manifest["cases"].as_object().unwrap();
        let trains = |case: &Value| case["tensors"].get("train.micro_index").is_some();
        let cases = cases.iter().filter(|(_, case)| trains(case));
        cases.map(|(name, _)| name.clone()).collect()
    }

    pub fn case(&self, name: &str) -> Case {
        let manifest = self.manifest["cases"][name].clone();
        let file = manifest["file"].as_str().unwrap();
        let source = open_tensor_file(&self.path(file)).unwrap();
        Case {
            name: name.to_owned(),
            tensors: read_all(source.as_ref()).unwrap(),
            manifest,
        }
    }
}

impl Case {
    pub fn hyper(&self, key: &str) -> &Value {
        &self.manifest["hyper_parameters"][key]
    }

    pub fn f32(&self, name: &str) -> Vec<f32> {
        self.tensors[name].to_f32().unwrap()
    }

    pub fn i64(&self, name: &str) -> Vec<i64> {
        self.tensors[name].to_i64().unwrap()
    }

    pub fn shape(&self, name: &str) -> &[usize] {
        &self.tensors[name].shape
    }

    /// The adapter folder that the case starts from, if any: `model/ + adapter/`.
    pub fn adapter(&self) -> Option<PathBuf> {
        let weights = self.manifest["weights"].as_str().unwrap();
        let (_, adapter) = weights.split_once(" + ")?;
        Some(family().path(adapter))
    }
}
