//! The list that makes a checkpoint folder complete: every file with its size and checksum.
//!
//! It is written last, so a folder that lacks it, or does not match it, was never finished or was
//! changed since.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::input_file::{open_plain, read_json};
use super::{CheckpointError, durable};

const MANIFEST_FILE: &str = "manifest.json";

/// How deep folders may stand in a checkpoint.
const MAX_DEPTH: usize = 8;

/// What a checkpoint folder holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The optimiser step that the state belongs to.
    pub step: u64,
    /// All files but the manifest, sorted by name.
    pub files: Vec<ManifestFile>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Its name inside the checkpoint folder, with `/` between folders.
    pub name: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// The CRC-32 of its contents, as eight hexadecimal digits.
    pub crc32: String,
}

/// Makes everything in `folder` durable and writes its manifest.
pub(super) fn seal(folder: &Path, step: u64) -> Result<(), CheckpointError> {
    let mut names = Vec::new();
    let mut folders = Vec::new();
    list(folder, "", MAX_DEPTH, &mut names, &mut folders)?;
    names.sort_unstable();
    if names.is_empty() || names.iter().any(|name| name == MANIFEST_FILE) {
        let reason = format!("it must have files, none of them called {MANIFEST_FILE}");
        return Err(unsavable(folder, reason));
    }
    let mut files = Vec::new();
    for name in names {
        let path = folder.join(&name);
        let (bytes, crc32) = File::open(&path)
            .and_then(|file| {
                file.sync_all()?;
                checksum(file)
            })
            .map_err(CheckpointError::write(&path))?;
        files.push(ManifestFile { name, bytes, crc32 });
    }
    for inner in folders.iter().rev() {
        durable::sync_folder(inner)?;
    }
    durable::write_json(&folder.join(MANIFEST_FILE), &Manifest { step, files })
}

/// Checks a folder against its manifest: sizes first, then the contents.
pub(super) fn verify(folder: &Path) -> Result<Manifest, CheckpointError> {
    let path = folder.join(MANIFEST_FILE);
    if folder.is_dir() && path.symlink_metadata().is_err() {
        return Err(broken(folder, format!("it has no {MANIFEST_FILE}")));
    }
    let manifest: Manifest = read_json(&path)?;
    if manifest.files.is_empty() {
        return Err(broken(
            folder,
            format!("its {MANIFEST_FILE} lists no files"),
        ));
    }
    let mut opened = Vec::new();
    for listed in &manifest.files {
        let name = &listed.name;
        let inside = |part| matches!(part, Component::Normal(_));
        if name.is_empty() || !Path::new(name).components().all(inside) {
            let reason = format!("its {MANIFEST_FILE} names '{name}', which is outside of it");
            return Err(broken(folder, reason));
        }
        let path = folder.join(name);
        let (_, bytes) = open_plain(&path).map_err(|cause| broken(folder, cause.to_string()))?;
        if bytes != listed.bytes {
            let reason = format!("{name} has {bytes} bytes instead of {}", listed.bytes);
            return Err(broken(folder, reason));
        }
        opened.push(path);
    }
    for (listed, path) in manifest.files.iter().zip(opened) {
        let found = File::open(&path)
            .and_then(checksum)
            .map_err(CheckpointError::read(&path))?;
        if found != (listed.bytes, listed.crc32.clone()) {
            let reason = format!("the contents of {} do not match its checksum", listed.name);
            return Err(broken(folder, reason));
        }
    }
    Ok(manifest)
}

fn broken(folder: &Path, reason: String) -> CheckpointError {
    CheckpointError::Broken {
        path: folder.to_owned(),
        reason,
    }
}

fn unsavable(path: &Path, reason: String) -> CheckpointError {
    CheckpointError::Unsavable {
        path: path.to_owned(),
        reason,
    }
}

/// Bytes and CRC-32 of a file, read once from front to back.
fn checksum(mut file: File) -> io::Result<(u64, String)> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, format!("{:08x}", hasher.finalize()))),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                bytes += count as u64;
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
        }
    }
}

/// Collects the files below `folder` by their names from the top, and all folders, outer ones first.
fn list(
    folder: &Path,
    lead: &str,
    depth: usize,
    names: &mut Vec<String>,
    folders: &mut Vec<PathBuf>,
) -> Result<(), CheckpointError> {
    folders.push(folder.to_owned());
    for entry in fs::read_dir(folder).map_err(CheckpointError::read(folder))? {
        let entry = entry.map_err(CheckpointError::read(folder))?;
        let kind = entry.file_type().map_err(CheckpointError::read(folder))?;
        match entry.file_name().to_str() {
            Some(name) if kind.is_file() => names.push(format!("{lead}{name}")),
            Some(name) if kind.is_dir() && depth > 0 => {
                list(
                    &entry.path(),
                    &format!("{lead}{name}/"),
                    depth - 1,
                    names,
                    folders,
                )?;
            }
            _ => {
                let reason = "only plain files and folders with readable names can be saved";
                return Err(unsavable(&entry.path(), reason.to_owned()));
            }
        }
    }
    Ok(())
}
