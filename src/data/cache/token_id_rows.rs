//! Rows of token ids out of files, not yet parsed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::data::DataError;
use crate::data::pretokenised::{Line, Lines};
use crate::data::text_rows::{BadRowLog, BadRows};

/// A line, with its file.
pub(super) struct TokenIdRow {
    /// The file.
    pub file: Arc<Path>,
    /// The line.
    pub line: Line,
}

/// The lines of all files, in order. An error ends them.
pub(super) struct TokenIdRows {
    /// Lines that are no text or too long.
    pub bad: BadRowLog,
    /// Files without any row.
    pub empty_files: Vec<PathBuf>,
    files: std::vec::IntoIter<PathBuf>,
    current: Option<(Arc<Path>, Lines)>,
    /// Whether the current file has had a line.
    any: bool,
    good: usize,
    bytes: u64,
    bytes_read: Arc<AtomicU64>,
}

impl TokenIdRows {
    /// The lines of these files.
    pub fn open(files: Vec<PathBuf>, bad_rows: BadRows) -> Self {
        let size = |file: &PathBuf| std::fs::metadata(file).map_or(0, |metadata| metadata.len());
        Self {
            bad: BadRowLog::new(bad_rows),
            empty_files: Vec::new(),
            current: None,
            any: false,
            good: 0,
            bytes: files.iter().map(size).sum(),
            files: files.into_iter(),
            bytes_read: Arc::default(),
        }
    }

    /// Size of all files on the disk, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How much of [`TokenIdRows::bytes`] was read so far.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes_read)
    }

    fn advance(&mut self) -> Result<Option<TokenIdRow>, DataError> {
        loop {
            let Some((file, lines)) = &mut self.current else {
                let Some(path) = self.files.next() else {
                    return Ok(None);
                };
                let lines = Lines::open(&path, &self.bytes_read)?;
                self.current = Some((path.into(), lines));
                self.any = false;
                continue;
            };
            match lines.next() {
                Some(Ok(line)) => {
                    self.any = true;
                    self.good += 1;
                    let file = Arc::clone(file);
                    return Ok(Some(TokenIdRow { file, line }));
                }
                Some(Err(error)) => {
                    self.any = true;
                    self.bad.reject(error, self.good)?;
                }
                None => {
                    if !self.any {
                        self.empty_files.push(file.to_path_buf());
                    }
                    self.current = None;
                }
            }
        }
    }
}

impl Iterator for TokenIdRows {
    type Item = Result<TokenIdRow, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}
