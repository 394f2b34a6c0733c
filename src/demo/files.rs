//! The demo's own folder: what may be in it, and files that are there whole or not at all.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::DemoError;
use crate::report::atomic_file::AtomicFile;

/// Says that the demo made a folder, so that the next demo may clear it.
const MARK: &str = ".mp-train-demo";

/// Where everything stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    root: PathBuf,
}

impl Folder {
    /// Takes a folder: makes it, or clears what an earlier demo left there.
    ///
    /// # Errors
    /// The folder holds something else, or cannot be written.
    pub fn take(root: &Path) -> Result<Self, DemoError> {
        let folder = Folder {
            root: root.to_owned(),
        };
        let failed = |source| DemoError::Io {
            path: root.to_owned(),
            source,
        };
        let is_empty = match fs::read_dir(root) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) if error.kind() == ErrorKind::NotFound => true,
            Err(error) => return Err(failed(error)),
        };
        if !is_empty && !root.join(MARK).is_file() {
            return Err(DemoError::FolderTaken {
                folder: root.to_owned(),
            });
        }
        for made in [
            folder.untrained(),
            folder.base(),
            folder.lora(),
            folder.prefix(),
        ] {
            match fs::remove_dir_all(&made) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
                _ => {}
            }
        }
        // The mark comes first: a demo that is killed behind it can be started anew.
        fs::create_dir_all(root).map_err(failed)?;
        write(&root.join(MARK), b"mp-train demo may clear this folder\n")?;
        fs::create_dir_all(folder.untrained()).map_err(failed)?;
        Ok(folder)
    }

    /// The model before it has learned anything.
    pub fn untrained(&self) -> PathBuf {
        self.root.join("untrained")
    }

    /// Output of the run that trains the base.
    pub fn base(&self) -> PathBuf {
        self.root.join("base")
    }

    /// The trained base.
    pub fn base_model(&self) -> PathBuf {
        self.base().join("model")
    }

    /// Output of the LoRA run.
    pub fn lora(&self) -> PathBuf {
        self.root.join("lora")
    }

    /// Output of the P-Tuning run.
    pub fn prefix(&self) -> PathBuf {
        self.root.join("ptuning")
    }

    /// A file at the top of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

/// Writes a file, whole or not at all.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), DemoError> {
    let write = || {
        let mut file = AtomicFile::create(path)?;
        file.write_all(bytes)?;
        file.commit()
    };
    write().map_err(|source| DemoError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Copies a file, whole or not at all.
pub fn copy(from: &Path, to: &Path) -> Result<(), DemoError> {
    let bytes = fs::read(from).map_err(|source| DemoError::Io {
        path: from.to_owned(),
        source,
    })?;
    write(to, &bytes)
}
