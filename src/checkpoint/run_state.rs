//! Saved states of a run: `checkpoint-N` folders that are complete or not there.
//!
//! A state is written into a hidden folder, sealed with a manifest, made durable, and only then renamed
//! to `checkpoint-N`. At no moment does a kill, a full disk or a power cut lose the newest state that
//! was complete. The hidden names in an output folder are
//!
//! | name | what | after a kill |
//! | --- | --- | --- |
//! | `.checkpoint-N.partial-PID` | being written | removed by the next save |
//! | `.checkpoint-N.replaced-PID` | the former `checkpoint-N`, while a new one takes its place | loaded where `checkpoint-N` is missing; put back by the next save |
//! | `.checkpoint-N.trash-PID` | being deleted | removed by the next save |
//!
//! A lock on the output folder is held during a save, so what lies there under a hidden name belongs to
//! a run that is gone.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process;

use rustix::fs::{FlockOperation, flock};

use super::safetensors::{SafetensorsFile, write_safetensors};
use super::{CheckpointError, HostTensor, durable, manifest, read_all};

pub use super::durable::{sync_folder, write_json};
pub use super::input_file::read_json;
pub use super::manifest::{Manifest, ManifestFile};

/// What [`latest_checkpoint`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LatestCheckpoint {
    /// The checkpoint folder with the highest step that is whole.
    pub path: Option<PathBuf>,
    /// Its step.
    pub step: Option<u64>,
    /// Newer ones that cannot be used, and why; worth a warning.
    pub skipped: Vec<(PathBuf, String)>,
}

/// Saves a state as `checkpoint-{step}` in `output` and deletes old ones.
///
/// `write` puts the files into the folder it is given; the manifest, the syncing and the renaming
/// happen here. A `checkpoint-{step}` that exists already is replaced. Afterwards the
/// `save_total_limit` highest steps are kept, the new one always among them; 0 keeps all.
///
/// # Errors
/// `write` failed, a file cannot be written, or another run is saving into `output`; then nothing of
/// the new checkpoint remains and the old ones are untouched. [`CheckpointError::Prune`] alone means
/// that the new checkpoint is there, but an old one could not be deleted.
pub fn save_checkpoint(
    output: &Path,
    step: u64,
    save_total_limit: usize,
    write: impl FnOnce(&Path) -> Result<(), CheckpointError>,
) -> Result<PathBuf, CheckpointError> {
    durable::create_folder(output)?;
    let _lock = lock(output)?;
    recover(output)?;
    let partial = Partial(hidden(output, step, "partial"));
    fs::create_dir(&partial.0).map_err(CheckpointError::write(&partial.0))?;
    write(&partial.0)?;
    manifest::seal(&partial.0, step)?;
    let saved = publish(output, step, &partial)?;
    prune(output, step, save_total_limit).map_err(|(path, cause)| CheckpointError::Prune {
        saved: saved.clone(),
        path,
        cause,
    })?;
    Ok(saved)
}

/// Finds the checkpoint with the highest step whose every file matches its manifest.
///
/// Nothing is changed on disk. A run that was killed while it replaced a checkpoint is found too, under
/// the hidden name of the former one.
///
/// # Errors
/// `output` exists but cannot be listed. A missing `output` has no checkpoints.
pub fn latest_checkpoint(output: &Path) -> Result<LatestCheckpoint, CheckpointError> {
    let mut latest = LatestCheckpoint::default();
    let mut candidates: Vec<_> = match fs::symlink_metadata(output) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Vec::new(),
        _ => entries(output)?,
    };
    candidates.retain(|entry| matches!(entry.kind, Kind::Checkpoint | Kind::Replaced));
    candidates.sort_by_key(|entry| (Reverse(entry.step), entry.kind != Kind::Checkpoint));
    for entry in candidates {
        let verdict = verify_checkpoint(&entry.path).and_then(|manifest| {
            if manifest.step == entry.step {
                return Ok(());
            }
            Err(CheckpointError::Broken {
                path: entry.path.clone(),
                reason: format!("its manifest is that of step {}", manifest.step),
            })
        });
        match verdict {
            Ok(()) => {
                latest.path = Some(entry.path);
                latest.step = Some(entry.step);
                break;
            }
            Err(cause) => latest.skipped.push((entry.path, cause.to_string())),
        }
    }
    Ok(latest)
}

/// Checks every file of a checkpoint folder against its manifest, size and contents.
///
/// # Errors
/// The manifest is missing or unreadable, or a file is missing or differs.
pub fn verify_checkpoint(folder: &Path) -> Result<Manifest, CheckpointError> {
    manifest::verify(folder)
}

/// Writes named tensors as one safetensors file.
///
/// # Errors
/// As [`write_safetensors`].
pub fn write_tensors(
    path: &Path,
    tensors: &BTreeMap<String, HostTensor>,
) -> Result<(), CheckpointError> {
    write_safetensors(path, tensors)
}

/// Reads all tensors of a safetensors file.
///
/// # Errors
/// As [`SafetensorsFile::open`].
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, HostTensor>, CheckpointError> {
    read_all(&SafetensorsFile::open(path)?)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Checkpoint,
    Partial,
    Replaced,
    Trash,
}

/// A folder in the output folder that this module made.
struct Entry {
    kind: Kind,
    step: u64,
    path: PathBuf,
}

fn checkpoint_path(output: &Path, step: u64) -> PathBuf {
    output.join(format!("checkpoint-{step}"))
}

fn hidden(output: &Path, step: u64, state: &str) -> PathBuf {
    output.join(format!(".checkpoint-{step}.{state}-{}", process::id()))
}

/// What a name in the output folder stands for, if it is one of ours.
fn parse_name(name: &str) -> Option<(Kind, u64)> {
    let (kind, digits) = if let Some(digits) = name.strip_prefix("checkpoint-") {
        (Kind::Checkpoint, digits)
    } else {
        let (digits, state) = name.strip_prefix(".checkpoint-")?.split_once('.')?;
        let (state, _pid) = state.split_once('-')?;
        let kind = match state {
            "partial" => Kind::Partial,
            "replaced" => Kind::Replaced,
            "trash" => Kind::Trash,
            _ => return None,
        };
        (kind, digits)
    };
    let step: u64 = digits.parse().ok()?;
    // "checkpoint-007" or "checkpoint-+7" was not made here.
    (step.to_string() == digits).then_some((kind, step))
}

fn entries(output: &Path) -> Result<Vec<Entry>, CheckpointError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(output).map_err(CheckpointError::read(output))? {
        let entry = entry.map_err(CheckpointError::read(output))?;
        let is_folder = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let Some((kind, step)) = entry.file_name().to_str().and_then(parse_name)
            && is_folder
        {
            let path = entry.path();
            found.push(Entry { kind, step, path });
        }
    }
    Ok(found)
}

/// The output folder, held by this save; given back when dropped or when the process dies.
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a process that another thread is just starting has the file open
        // too, for the moment until it is replaced by its program.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Takes the output folder for this save.
fn lock(output: &Path) -> Result<Lock, CheckpointError> {
    let folder = File::open(output).map_err(CheckpointError::read(output))?;
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(CheckpointError::Busy {
            path: output.to_owned(),
        }),
        // Some network file systems have no locks for folders; there the user alone keeps runs apart.
        _ => Ok(Lock(folder)),
    }
}

/// Brings the leftovers of a killed run in order; see the table at the top.
fn recover(output: &Path) -> Result<(), CheckpointError> {
    let mut leftovers = entries(output)?;
    leftovers.retain(|entry| entry.kind != Kind::Checkpoint);
    // The trash first, so that its names are free again.
    leftovers.sort_by_key(|entry| entry.kind == Kind::Replaced);
    for entry in &leftovers {
        let path = &entry.path;
        let done = if entry.kind == Kind::Replaced && makes_way(output, entry)? {
            fs::rename(path, checkpoint_path(output, entry.step))
        } else {
            fs::remove_dir_all(path)
        };
        done.map_err(CheckpointError::write(path))?;
    }
    if leftovers.is_empty() {
        return Ok(());
    }
    durable::sync_folder(output)
}

/// Whether a former checkpoint should have its name back: nothing took its place, or something that
/// is not whole while the former one is, which is then removed.
fn makes_way(output: &Path, former: &Entry) -> Result<bool, CheckpointError> {
    let successor = checkpoint_path(output, former.step);
    if fs::symlink_metadata(&successor).is_err() {
        return Ok(true);
    }
    if manifest::verify(&successor).is_ok() || manifest::verify(&former.path).is_err() {
        return Ok(false);
    }
    discard(output, former.step, &successor).map_err(CheckpointError::write(&successor))?;
    Ok(true)
}

/// A folder being written; whatever is left of it goes when the save ends, also by a panic.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Gives a sealed folder its final name, moving a former checkpoint of the same step aside first.
fn publish(output: &Path, step: u64, partial: &Partial) -> Result<PathBuf, CheckpointError> {
    let path = checkpoint_path(output, step);
    let aside = hidden(output, step, "replaced");
    let replacing = match fs::symlink_metadata(&path) {
        Ok(former) if former.is_dir() => {
            fs::rename(&path, &aside).map_err(CheckpointError::write(&path))?;
            true
        }
        Ok(_) => {
            return Err(CheckpointError::write(&path)(
                io::ErrorKind::AlreadyExists.into(),
            ));
        }
        Err(_) => false,
    };
    if let Err(cause) = fs::rename(&partial.0, &path) {
        if replacing {
            // If this fails too, the next save puts it back, and `latest_checkpoint` finds it there.
            let _ = fs::rename(&aside, &path);
        }
        return Err(CheckpointError::write(&path)(cause));
    }
    durable::sync_folder(output)?;
    if replacing {
        discard(output, step, &aside).map_err(|cause| CheckpointError::Prune {
            saved: path.clone(),
            path: aside.clone(),
            cause,
        })?;
    }
    Ok(path)
}

/// Deletes a folder, first taking its name away: what is half deleted is never taken for a checkpoint.
fn discard(output: &Path, step: u64, path: &Path) -> io::Result<()> {
    let trash = hidden(output, step, "trash");
    fs::rename(path, &trash)?;
    fs::remove_dir_all(&trash)
}

/// Deletes all but the `limit` highest steps; `saved` is kept even where others are higher, as after a
/// run that went back to an earlier state.
fn prune(output: &Path, saved: u64, limit: usize) -> Result<(), (PathBuf, io::Error)> {
    if limit == 0 {
        return Ok(());
    }
    let listed = entries(output).map_err(|cause| (output.to_owned(), io::Error::other(cause)))?;
    let mut old: Vec<_> = listed
        .into_iter()
        .filter(|entry| entry.kind == Kind::Checkpoint && entry.step != saved)
        .collect();
    old.sort_by_key(|entry| Reverse(entry.step));
    for entry in old.into_iter().skip(limit - 1) {
        discard(output, entry.step, &entry.path).map_err(|cause| (entry.path, cause))?;
    }
    Ok(())
}
