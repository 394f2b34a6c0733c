//! The bytes of a Parquet file, read where they are wanted and counted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open file of known length.
pub(super) struct Source {
    file: File,
    length: u64,
    /// Bytes of this file that were counted for the progress.
    counted: AtomicU64,
    bytes_read: Arc<AtomicU64>,
}

impl Source {
    pub fn open(path: &Path, bytes_read: &Arc<AtomicU64>) -> std::io::Result<Self> {
        let file = File::open(path)?;
        Ok(Self {
            length: file.metadata()?.len(),
            file,
            counted: AtomicU64::new(0),
            bytes_read: Arc::clone(bytes_read),
        })
    }

    /// Bytes of the file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// So many bytes from `at` on.
    pub fn read(&self, at: u64, bytes: u64) -> Result<Vec<u8>, String> {
        let end = at.checked_add(bytes).filter(|&end| end <= self.length);
        let (Some(_), Ok(size)) = (end, usize::try_from(bytes)) else {
            return Err(format!(
                "it points to byte {at} and {bytes} from there, but has {}; is it complete?",
                self.length
            ));
        };
        let mut buffer = vec![0; size];
        let read = self.file.read_exact_at(&mut buffer, at);
        read.map_err(|error| format!("byte {at} cannot be read: {error}"))?;
        Ok(buffer)
    }

    /// Counts the file as read up to this share of it, in thousandths.
    pub fn progressed(&self, thousandths: u64) {
        let to = (self.length as u128 * u128::from(thousandths.min(1000)) / 1000) as u64;
        let before = self.counted.fetch_max(to, Ordering::Relaxed);
        let more = to.saturating_sub(before);
        self.bytes_read.fetch_add(more, Ordering::Relaxed);
    }
}
