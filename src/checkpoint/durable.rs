//! Writing files so that under their final name they are complete or absent, also after a power cut.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;

use serde::Serialize;

use super::CheckpointError;

/// Writes `path` through a temporary file beside it: written, fsynced, renamed, folder fsynced.
///
/// When anything fails the temporary file is removed and what stood at `path` before still does.
pub(super) fn write_file(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    let name = path
        .file_name()
        .ok_or_else(|| CheckpointError::write(path)(io::ErrorKind::InvalidFilename.into()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".partial-{}", process::id()));
    let temporary = Temporary(path.with_file_name(hidden));

    let write_all = || {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&temporary.0)?);
        write(&mut out)?;
        out.into_inner()?.sync_all()?;
        fs::rename(&temporary.0, path)
    };
    write_all().map_err(CheckpointError::write(path))?;
    sync_folder(parent_of(path))
}

/// A file that is removed when it goes out of scope; after a rename there is nothing left to remove.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Writes `value` as indented JSON, atomically.
///
/// # Errors
/// The file cannot be written, or `value` has no JSON form (a map whose keys are no strings).
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), CheckpointError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|cause| CheckpointError::Json {
        path: path.to_owned(),
        reason: cause.to_string(),
    })?;
    text.push(b'\n');
    write_file(path, |out| out.write_all(&text))
}

/// Creates a folder, its parents too, and makes the new entry durable.
pub(super) fn create_folder(path: &Path) -> Result<(), CheckpointError> {
    if path.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(CheckpointError::write(path))?;
    sync_folder(parent_of(path))
}

/// Makes the names in a folder durable.
///
/// # Errors
/// The folder cannot be opened or synced.
pub fn sync_folder(folder: &Path) -> Result<(), CheckpointError> {
    let synced = File::open(folder).and_then(|handle| handle.sync_all());
    match synced {
        // Some network file systems have no fsync for folders; renames there are durable themselves.
        Err(cause) if cause.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other.map_err(CheckpointError::write(folder)),
    }
}

/// The folder a path stands in; "." for a bare name.
fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
