//! A Hugging Face model folder: one weight file, or shards and the index that says what is where.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::input_file::read_json;
use super::{CheckpointError, HostTensor, OpenTensor, TensorInfo, TensorSource, open_tensor_file};

/// The names weights go by, in the order they are looked for.
const WEIGHT_FILES: [&str; 4] = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
];

/// The tensors of a model folder, read one at a time, from several threads if need be.
pub struct ModelFolder {
    path: PathBuf,
    shards: Vec<Box<dyn TensorSource>>,
    /// Tensor name to place in `shards`.
    shard_of: BTreeMap<String, usize>,
}

/// The part of an index file that is used; the total size is often wrong after conversions.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ModelFolder {
    /// Opens the weights of a folder: `model.safetensors`, `model.safetensors.index.json`,
    /// `pytorch_model.bin` or `pytorch_model.bin.index.json`, whichever is found first.
    ///
    /// # Errors
    /// There is no such folder, no weights in it, an index that names files outside the folder, files
    /// that are missing or tensors that are not in the file it says, a tensor that the index does not
    /// name or that stands in two files, or a weight file that cannot be used.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        if !folder.is_dir() {
            return Err(CheckpointError::NotAFolder {
                path: folder.to_owned(),
                wanted: "a model folder in the Hugging Face layout",
            });
        }
        let found = WEIGHT_FILES
            .iter()
            .map(|name| folder.join(name))
            // Not `exists`: a dangling link should be reported as what it is, not passed over.
            .find(|path| path.symlink_metadata().is_ok());
        match found {
            None => Err(CheckpointError::NoWeights {
                path: folder.to_owned(),
                looked_for: WEIGHT_FILES.join(", "),
            }),
            Some(path) if path.extension().is_some_and(|kind| kind == "json") => {
                Self::open_sharded(folder, &path)
            }
            Some(path) => Self::open_single(folder, &path),
        }
    }

    fn open_single(folder: &Path, path: &Path) -> Result<Self, CheckpointError> {
        let shard = open_tensor_file(path)?;
        Ok(Self {
            path: folder.to_owned(),
            shard_of: shard.names().into_iter().map(|name| (name, 0)).collect(),
            shards: vec![shard],
        })
    }

    fn open_sharded(folder: &Path, index_path: &Path) -> Result<Self, CheckpointError> {
        let wrong = |reason: String| CheckpointError::Index {
            path: index_path.to_owned(),
            reason,
        };
        let index: Index = read_json(index_path)?;
        let mut files: Vec<&str> = index.weight_map.values().map(String::as_str).collect();
        files.sort_unstable();
        files.dedup();
        if files.is_empty() {
            return Err(wrong("its weight_map is empty".to_owned()));
        }

        let mut shards = Vec::new();
        for &file in &files {
            if !is_plain_name(file) {
                return Err(wrong(format!(
                    "it names '{file}', which is not a file name inside the folder"
                )));
            }
            let path = folder.join(file);
            if path.symlink_metadata().is_err() {
                return Err(wrong(format!("it names '{file}', which is missing")));
            }
            let shard = open_tensor_file(&path)?;
            for name in shard.names() {
                let listed = index.weight_map.get(&name).map(String::as_str);
                if listed != Some(file) {
                    return Err(wrong(match listed {
                        Some(other) => format!(
                            "it places tensor '{name}' in '{other}', but it stands in '{file}' too"
                        ),
                        None => format!("it does not name tensor '{name}' of '{file}'"),
                    }));
                }
            }
            shards.push(shard);
        }

        let mut shard_of = BTreeMap::new();
        for (name, file) in &index.weight_map {
            let place = files.partition_point(|&other| other < file.as_str());
            if shards[place].info(name).is_none() {
                return Err(wrong(format!(
                    "it places tensor '{name}' in '{file}', where it is not"
                )));
            }
            shard_of.insert(name.clone(), place);
        }
        Ok(Self {
            path: folder.to_owned(),
            shards,
            shard_of,
        })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn shard(&self, name: &str) -> Option<&dyn TensorSource> {
        let &place = self.shard_of.get(name)?;
        self.shards.get(place).map(Box::as_ref)
    }

    fn shard_with(&self, name: &str) -> Result<&dyn TensorSource, CheckpointError> {
        self.shard(name)
            .ok_or_else(|| CheckpointError::NoSuchTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })
    }
}

impl std::fmt::Debug for ModelFolder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelFolder")
            .field("path", &self.path)
            .field("tensors", &self.shard_of.len())
            .finish_non_exhaustive()
    }
}

impl TensorSource for ModelFolder {
    fn names(&self) -> Vec<String> {
        self.shard_of.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.shard(name)?.info(name)
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        self.shard_with(name)?.read(name)
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        self.shard_with(name)?.open(name)
    }
}

/// Whether `name` is one plain file name: no folders, no `..`, nothing that leaves the folder.
pub(super) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let single = matches!(parts.next(), Some(Component::Normal(part)) if part == name);
    single && parts.next().is_none() && !name.contains(['\\', '\0'])
}
