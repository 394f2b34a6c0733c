//! A folder of this process in memory, since the readers take paths.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The folder; made once.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let name = format!("mp-train-fuzz-{}", std::process::id());
        let folder = Path::new("/dev/shm").join(name);
        fs::create_dir_all(&folder).expect("/dev/shm is there and can be written");
        folder
    })
}

/// Writes a file of that folder.
pub fn write(name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder().join(name);
    fs::write(&path, bytes).expect("/dev/shm has room");
    path
}
