//! Opening files that somebody else wrote: plain files only, of a bounded size, no LFS pointers, and no
//! links that lead out of the folder.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::CheckpointError;

const LFS_LEAD: &[u8] = b"version https://git-lfs";

/// The most bytes of a JSON file; an index of a large model has about a hundredth of it.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Opens a plain file for reading and returns it with its size in bytes.
///
/// A pipe is refused before it is opened, since opening one waits for a writer for ever.
pub(super) fn open_plain(path: &Path) -> Result<(File, u64), CheckpointError> {
    let meta = fs::metadata(path).map_err(CheckpointError::read(path))?;
    if !meta.is_file() {
        return Err(CheckpointError::NotAFile {
            path: path.to_owned(),
        });
    }
    if let Some(target) = target_outside(path).map_err(CheckpointError::read(path))? {
        return Err(CheckpointError::Outside {
            path: path.to_owned(),
            target,
        });
    }
    let mut file = File::open(path).map_err(CheckpointError::read(path))?;
    let mut lead = Vec::new();
    (&file)
        .take(LFS_LEAD.len() as u64)
        .read_to_end(&mut lead)
        .and_then(|_| file.rewind())
        .map_err(CheckpointError::read(path))?;
    if lead == LFS_LEAD {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    Ok((file, meta.len()))
}

/// Where a file lies, if it is a link that leads out of its folder. A folder that somebody made up must
/// not have other files of this machine read as its own; but the links of Hugging Face's cache, which
/// lead from `models--.../snapshots/...` (once from any folder) to `models--.../blobs`, are as good as
/// files.
fn target_outside(path: &Path) -> std::io::Result<Option<PathBuf>> {
    if !path.symlink_metadata()?.is_symlink() {
        return Ok(None);
    }
    let target = fs::canonicalize(path)?;
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => fs::canonicalize(folder)?,
        _ => fs::canonicalize(".")?,
    };
    let inside = target.starts_with(folder) || is_cache_blob(&target);
    Ok((!inside).then_some(target))
}

/// Whether a file is one of `models--{owner}--{name}/blobs/`.
fn is_cache_blob(target: &Path) -> bool {
    let mut above = target.ancestors().skip(1);
    let mut name = || above.next()?.file_name()?.to_str();
    name() == Some("blobs") && name().is_some_and(|name| name.starts_with("models--"))
}

/// Reads a JSON file into `T`.
///
/// # Errors
/// The file cannot be read, is larger than 64 MiB, or is not the JSON that `T` needs.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    let (file, size) = open_plain(path)?;
    if size > MAX_JSON_BYTES {
        return Err(CheckpointError::TooLarge {
            path: path.to_owned(),
            size,
            limit: MAX_JSON_BYTES,
            what: "a JSON file",
        });
    }
    let mut text = Vec::new();
    file.take(MAX_JSON_BYTES)
        .read_to_end(&mut text)
        .map_err(CheckpointError::read(path))?;
    serde_json::from_slice(&text).map_err(|cause| CheckpointError::Json {
        path: path.to_owned(),
        reason: cause.to_string(),
    })
}
