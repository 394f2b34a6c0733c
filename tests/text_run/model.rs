//! A small model that reads text, for the tests that need one.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use mp_train::demo::{self, DemoOptions};
use tempfile::TempDir;

/// The demo's model before it learns: 760 pieces, 256 positions. Made once.
pub fn untrained() -> &'static Path {
    static MADE: OnceLock<TempDir> = OnceLock::new();
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let folder = MADE.get_or_init(|| tempfile::tempdir().unwrap());
        let options = DemoOptions {
            output: folder.path().to_owned(),
            seed: 7,
            threads: 1,
        };
        demo::run(&options, &mut |_| {}, &AtomicBool::new(true)).unwrap();
        folder.path().join("untrained")
    })
}
