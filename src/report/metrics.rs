//! `metrics.jsonl`, `validation.jsonl` and `memory.jsonl`: one JSON object per optimiser step,
//! measurement or end of a run, for programs.
//!
//! A row is a [`StepReport`](super::StepReport), a [`ValidationReport`](super::ValidationReport) or a
//! [`MemoryReport`](super::MemoryReport) with its field names as keys. Floats are written with all digits needed
//! to read the same bits back; not-a-number and infinity are null.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic_file::AtomicFile;

/// Rows of steps, in the output folder.
pub const STEPS: &str = "metrics.jsonl";
/// Rows of validation losses, in the output folder.
pub const VALIDATION: &str = "validation.jsonl";
/// Rows of planned and used memory, in the output folder of a run on GPUs.
pub const MEMORY: &str = "memory.jsonl";

/// Longest row that is kept on resume: far more than one with a million micro-batches needs.
const MAX_ROW_BYTES: u64 = 1 << 26;

/// Why the metrics could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}", path = path.display())]
pub struct MetricsError {
    path: PathBuf,
    source: io::Error,
}

/// An open file of rows of a run.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    path: PathBuf,
}

impl Metrics {
    /// Opens the file `name` in the folder `output` for a run that has done `start_step` steps. Rows of later
    /// steps (a resumed run does them again) and torn rows are dropped; the others stay byte for byte.
    pub fn open(output: &Path, name: &str, start_step: u64) -> Result<Self, MetricsError> {
        let path = output.join(name);
        let open = || {
            keep_rows(&path, start_step)?;
            OpenOptions::new().append(true).open(&path)
        };
        match open() {
            Ok(file) => Ok(Metrics { file, path }),
            Err(source) => Err(MetricsError { path, source }),
        }
    }

    /// Adds a row, in one write, so that a reader sees whole rows only.
    pub fn append(&mut self, report: &impl Serialize) -> Result<(), MetricsError> {
        let write = || {
            let mut row = serde_json::to_vec(report)?;
            row.push(b'\n');
            (&self.file).write_all(&row)
        };
        write().map_err(|source| MetricsError {
            path: self.path.clone(),
            source,
        })
    }
}

/// Rewrites the file with the rows of steps up to `last` alone.
fn keep_rows(path: &Path, last: u64) -> io::Result<()> {
    #[derive(Deserialize)]
    struct Row {
        step: u64,
    }
    let mut kept = BufWriter::new(AtomicFile::create(path)?);
    match File::open(path) {
        Ok(file) => {
            let mut rows = BufReader::new(file);
            let mut row = Vec::new();
            while rows
                .by_ref()
                .take(MAX_ROW_BYTES)
                .read_until(b'\n', &mut row)?
                > 0
            {
                let is_whole = row.ends_with(b"\n");
                if is_whole && serde_json::from_slice(&row).is_ok_and(|Row { step }| step <= last) {
                    kept.write_all(&row)?;
                }
                row.clear();
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    kept.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .commit()
}
