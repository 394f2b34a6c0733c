//! What a run leaves behind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use serde_json::Value;

/// Everything about a run that must be the same however it was laid out.
#[derive(PartialEq)]
pub struct Outcome {
    /// Rows of metrics.jsonl, wall time apart.
    pub metrics: Vec<Value>,
    /// Files of the result and of the last checkpoint's state.
    pub files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Outcome {
    /// Reads the output folder of a finished run.
    pub fn read(output: &Path) -> Self {
        let metrics = metrics(output);
        let last = metrics.last().unwrap()["step"].as_u64().unwrap();
        let checkpoint = output.join(format!("checkpoint-{last}"));
        let mut files = BTreeMap::new();
        for (folder, names) in [
            (result_folder(output), None),
            (
                checkpoint,
                Some(["state.safetensors", "trainer_state.json"]),
            ),
        ] {
            for entry in std::fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                if names.is_none_or(|names| names.contains(&name)) {
                    let key = path.strip_prefix(output).unwrap().to_owned();
                    files.insert(key, std::fs::read(&path).unwrap());
                }
            }
        }
        assert!(files.len() >= 4, "{:?}", files.keys());
        Outcome { metrics, files }
    }

    /// Fails with the first difference, in words rather than in bytes.
    #[track_caller]
    pub fn assert_equals(&self, other: &Outcome, what: &str) {
        assert_same_metrics(&self.metrics, &other.metrics, what);
        let names = |outcome: &Outcome| outcome.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(other), "{what}");
        for (name, bytes) in &self.files {
            assert!(*bytes == other.files[name], "{what}: {name:?} differs");
        }
    }

    pub fn column(&self, key: &str) -> Vec<f64> {
        column(&self.metrics, key)
    }
}

#[track_caller]
pub fn assert_same_metrics(found: &[Value], expected: &[Value], what: &str) {
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found, expected, "{what}");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}

/// One number of each row.
pub fn column(metrics: &[Value], key: &str) -> Vec<f64> {
    let number = |row: &Value| row[key].as_f64().unwrap();
    metrics.iter().map(number).collect()
}

/// Rows of metrics.jsonl, wall time apart.
pub fn metrics(output: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let row = |line: &str| {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let seconds = row.as_object_mut().unwrap().remove("seconds");
        assert!(seconds.unwrap().as_f64().unwrap() > 0.0);
        row
    };
    text.lines().map(row).collect()
}

fn result_folder(output: &Path) -> PathBuf {
    let folders = ["adapter", "model"].map(|name| output.join(name));
    folders.into_iter().find(|folder| folder.is_dir()).unwrap()
}

/// The tensors of a run's result.
pub fn result_tensors(output: &Path) -> BTreeMap<String, HostTensor> {
    let folder = result_folder(output);
    let names = [
        "adapter_model.safetensors",
        "prefix.safetensors",
        "model.safetensors",
    ];
    let files = names.map(|name| folder.join(name));
    let file = files.iter().find(|path| path.is_file()).unwrap();
    read_all(open_tensor_file(file).unwrap().as_ref()).unwrap()
}

/// The checkpoints of an output folder, lowest first; fails on anything left half-written.
#[track_caller]
pub fn checkpoints(output: &Path) -> Vec<u64> {
    let mut steps = Vec::new();
    let Ok(entries) = std::fs::read_dir(output) else {
        return steps;
    };
    for entry in entries {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.starts_with('.'), "{name} was left behind");
        if let Some(step) = name.strip_prefix("checkpoint-") {
            steps.push(step.parse().unwrap());
        }
    }
    steps.sort_unstable();
    steps
}
