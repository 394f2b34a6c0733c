//! The folder that every case starts from: two small models and rows that are right.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use tempfile::TempDir;

/// Token ids for `model`.
pub const ROWS: &str = r#"{"input_ids": [5, 6, 191, 194, 7, 8, 195], "labels": [-100, -100, -100, -100, 7, 8, 195]}
{"input_ids": [9, 191, 194, 4, 195], "labels": [-100, -100, -100, 4, 195]}
"#;

/// Text for `text_model`.
pub const ALPACA: &str = r#"{"instruction": "Who are you?", "input": "", "output": "A small model."}
{"instruction": "Name a colour.", "input": "", "output": "Blue."}
"#;

/// A folder of one case, with `model`, `text_model`, `rows.jsonl` and `alpaca.jsonl`.
pub struct World(TempDir);

impl World {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        copy(&golden("model"), &folder.path().join("model"));
        copy(super::model::untrained(), &folder.path().join("text_model"));
        fs::write(folder.path().join("rows.jsonl"), ROWS).unwrap();
        fs::write(folder.path().join("alpaca.jsonl"), ALPACA).unwrap();
        World(folder)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path().join(name)).unwrap()
    }

    /// Lays the stored file `from` (below tests/) over `to`.
    pub fn stored(&self, from: &str, to: &str) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests")
            .join(from);
        match from.is_dir() {
            true => copy(&from, &self.path().join(to)),
            false => drop(fs::copy(from, self.path().join(to)).unwrap()),
        }
    }

    pub fn change_json(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let mut value = serde_json::from_slice(&self.read(name)).unwrap();
        change(&mut value);
        self.write(name, value.to_string());
    }

    /// Everything in the folder: files with their bytes, folders with none.
    pub fn contents(&self) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
        let mut found = BTreeMap::new();
        let mut open = vec![self.path().to_owned()];
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let name = path.strip_prefix(self.path()).unwrap().to_owned();
                found.insert(name, fs::read(&path).ok());
                if path.is_dir() {
                    open.push(path);
                }
            }
        }
        found
    }
}

pub fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    std::io::Write::write_all(&mut encoder, text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/chatglm-6b")
        .join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}
