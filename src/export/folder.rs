//! A folder that appears when it is complete.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::ExportError;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::run_state::sync_folder;

/// What belongs to a model beside its weights and `config.json`: tokenizer, generation settings, chat
/// template, licence, and the Python code that `trust_remote_code` runs.
const BESIDE: [&str; 13] = [
    "generation_config.json",
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*LICENSE*",
    "NOTICE*",
    "*.py",
];

/// A folder in the making. It gets its name in [`NewFolder::finish`]; dropped before that, it is gone.
#[derive(Debug)]
pub struct NewFolder {
    temporary: PathBuf,
    path: PathBuf,
}

impl NewFolder {
    /// Starts a folder beside `path`, so that renaming cannot cross file systems.
    ///
    /// # Errors
    /// There is something at `path` that is no empty folder, or nothing can be written there.
    pub fn create(path: &Path) -> Result<Self, ExportError> {
        match fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Err(cause) if cause.kind() == ErrorKind::NotFound => {}
            Ok(false) | Err(_) => {
                return Err(ExportError::FolderTaken {
                    folder: path.to_owned(),
                });
            }
        }
        let name = path
            .file_name()
            .ok_or_else(|| failed(path)(ErrorKind::InvalidFilename.into()))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".partial-{}", std::process::id()));
        let temporary = path.with_file_name(hidden);
        fs::create_dir_all(parent_of(path)).map_err(failed(path))?;
        fs::create_dir(&temporary).map_err(failed(&temporary))?;
        Ok(NewFolder {
            temporary,
            path: path.to_owned(),
        })
    }

    /// Where its files are written.
    pub fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Copies what belongs to the model in `from`, weights and `config.json` aside. What is a link
    /// there, as in Hugging Face's cache, is a file here.
    pub fn copy_beside(&self, from: &Path) -> Result<(), ExportError> {
        let as_shells_do = glob::MatchOptions {
            require_literal_leading_dot: true,
            ..glob::MatchOptions::new()
        };
        let patterns = BESIDE.map(|pattern| glob::Pattern::new(pattern).ok());
        let entries = fs::read_dir(from).map_err(unread(from))?;
        for entry in entries {
            let name = entry.map_err(unread(from))?.file_name();
            let Some(name) = name.to_str() else { continue };
            let wanted = |pattern: &glob::Pattern| pattern.matches_with(name, as_shells_do);
            if patterns.iter().flatten().any(wanted) {
                self.copy_if_there(from, name)?;
            }
        }
        Ok(())
    }

    /// Copies one plain file, if it is there.
    pub fn copy_if_there(&self, from: &Path, name: &str) -> Result<(), ExportError> {
        let (from, to) = (from.join(name), self.temporary.join(name));
        match fs::metadata(&from) {
            Ok(meta) if meta.is_file() => {}
            Ok(_) => return Ok(()),
            Err(cause) if cause.kind() == ErrorKind::NotFound => return Ok(()),
            Err(cause) => return Err(unread(&from)(cause)),
        }
        let copied = fs::copy(&from, &to).and_then(|_| fs::File::open(&to)?.sync_all());
        copied.map_err(failed(&to))
    }

    /// Gives the folder its name.
    pub fn finish(self) -> Result<(), ExportError> {
        sync_folder(&self.temporary)?;
        fs::rename(&self.temporary, &self.path).map_err(failed(&self.path))?;
        Ok(sync_folder(parent_of(&self.path))?)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        // After `finish` there is nothing under this name.
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    let path = path.to_owned();
    move |cause| CheckpointError::Write { path, cause }.into()
}

fn unread(path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    let path = path.to_owned();
    move |cause| CheckpointError::Read { path, cause }.into()
}

/// The folder a path stands in; "." for a bare name.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
