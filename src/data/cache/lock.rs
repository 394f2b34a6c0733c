//! Of several runs that need the same cache file one makes it, and the others wait for it.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use super::progress::{INTERVAL, Meter, Phase};
use crate::data::DataError;

/// Held while a cache file is made. The system gives it up when the process ends, however it ends.
pub(super) struct BuildLock {
    /// `None` on a file system that knows no locks; then each run makes its own file, and the last
    /// one renamed stays.
    file: Option<File>,
    name: String,
}

impl BuildLock {
    /// Waits for the right to make the cache file `name` in `folder`.
    ///
    /// # Errors
    /// The folder cannot be written to; an interruption.
    pub fn acquire(folder: &Path, name: &str, meter: &mut Meter<'_>) -> Result<Self, DataError> {
        let path = lock_path(folder, name);
        let file = open(&path).map_err(|source| DataError::Cache { path, source })?;
        let mut waited = false;
        let locked = loop {
            match file.try_lock() {
                Ok(()) => break true,
                Err(TryLockError::WouldBlock) => {
                    if !waited {
                        meter.begin(Phase::Waiting, 0);
                    }
                    waited = true;
                    meter.update(|_| ())?;
                    std::thread::sleep(INTERVAL);
                }
                Err(TryLockError::Error(_)) => break false,
            }
        };
        if waited {
            meter.finish()?;
        }
        Ok(Self {
            file: locked.then_some(file),
            name: name.to_owned(),
        })
    }

    /// Removes what runs have left that were killed while they made a file.
    pub fn remove_leftovers(&self, folder: &Path) {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        for path in entries.flatten().map(|entry| entry.path()) {
            let Some(name) = partial_of(&path) else {
                continue;
            };
            // Nobody else writes what this lock stands for; of others it has to be asked, and held
            // until the file is gone.
            let own = name == self.name;
            let mut free = own && self.file.is_some();
            let other = (!own).then(|| open(&lock_path(folder, &name)));
            if let Some(Ok(lock)) = &other {
                free = lock.try_lock().is_ok();
            }
            if free {
                // It only takes room: whether it can be removed decides nothing.
                let _ = std::fs::remove_file(&path);
            }
        }
    }
}

/// Removes the lock of a file that was not made. A run that waits for it makes the file as if it
/// were alone.
pub(super) fn remove(folder: &Path, name: &str) {
    // An empty file that stays behind does no harm.
    let _ = std::fs::remove_file(lock_path(folder, name));
}

fn open(path: &Path) -> std::io::Result<File> {
    let mut options = File::options();
    options.create(true).truncate(false).write(true).open(path)
}

fn lock_path(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!(".{name}.lock"))
}

/// The name of a file that is being made, beside its place.
pub(super) fn partial_path(folder: &Path, name: &str, suffix: &str) -> PathBuf {
    folder.join(format!(".{name}.partial-{suffix}"))
}

/// The cache file that a partial one was to become.
fn partial_of(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.strip_prefix('.')?;
    let (name, _) = name.split_once(".partial-")?;
    Some(name.to_owned())
}
