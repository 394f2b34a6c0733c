//! Makes rows of files: one thread reads, many make token ids, the caller's writes them in order.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::ordered::in_order;
use super::progress::{Meter, Phase};
use super::token_id_rows::{TokenIdRow, TokenIdRows};
use super::writer::CacheWriter;
use super::{RowKind, no_rows};
use crate::config::model::ModelConfig;
use crate::data::rows::{RawRow, RowBlock};
use crate::data::text_rows::{
    BadRowLog, BadRows, Cuts, Encoded, RowEncoder, RowReport, TextRow, TextRows,
};
use crate::data::{DataError, RowProblem};

/// Where rows go.
pub(super) enum Sink {
    /// Into memory.
    Memory(RowBlock),
    /// Into a cache file, with the place it will have.
    File(Box<CacheWriter>, PathBuf),
}

impl Sink {
    fn append(&mut self, block: &RowBlock) -> Result<(), DataError> {
        match self {
            Self::Memory(rows) => {
                for entry in block.entries() {
                    let words = block.words().get(entry.range());
                    rows.append(entry, words.unwrap_or_default());
                }
                Ok(())
            }
            Self::File(writer, path) => writer.append(block).map_err(|source| DataError::Cache {
                path: path.clone(),
                source,
            }),
        }
    }
}

/// What one batch became.
#[derive(Default)]
struct Made {
    rows: RowBlock,
    /// Rows that cannot be used, each with the number of usable ones before it.
    bad: Vec<(usize, DataError)>,
    cuts: Cuts,
}

impl Made {
    fn push(
        &mut self,
        row: Result<&RawRow, RowProblem>,
        model: &ModelConfig,
        place: impl FnOnce(RowProblem) -> DataError,
    ) {
        if let Err(problem) = row.and_then(|row| self.rows.push(row, model)) {
            self.bad.push((self.rows.len(), place(problem)));
        }
    }
}

/// Makes the rows of all files and gives them to `sink`; what was noticed.
///
/// # Errors
/// What is wrong with files and rows; a sink that takes no more; an interruption.
pub(super) fn rows(
    files: &[PathBuf],
    kind: RowKind<'_>,
    model: &ModelConfig,
    threads: usize,
    sink: &mut Sink,
    meter: &mut Meter<'_>,
) -> Result<RowReport, DataError> {
    match kind {
        RowKind::Text {
            settings,
            tokenizer,
        } => {
            let encoder = RowEncoder::new(tokenizer, &settings.template)?;
            let mut rows = TextRows::open(files, settings)?;
            let collect = Collect::new(settings.bad_rows, rows.bytes(), rows.bytes_read());
            let size = |row: &TextRow| row.text.bytes();
            let work = |batch| encoded(batch, encoder, model);
            let mut report = collect.run(&mut rows, size, threads, work, sink, meter)?;
            let read = rows.report();
            report.repeated_columns = read.repeated_columns;
            report.first_repeated.clone_from(&read.first_repeated);
            report.empty_files.clone_from(&read.empty_files);
            report.unanswered = read.unanswered;
            report.undefined_tools = read.undefined_tools;
            let made = std::mem::replace(&mut report.bad, read.bad.clone());
            report.bad.merge(made);
            checked(files, report)
        }
        RowKind::TokenIds { bad_rows } => {
            let mut rows = TokenIdRows::open(files.to_vec(), bad_rows);
            let collect = Collect::new(bad_rows, rows.bytes(), rows.bytes_read());
            let size = |row: &TokenIdRow| row.line.text.len();
            let work = |batch| parsed(batch, model);
            let mut report = collect.run(&mut rows, size, threads, work, sink, meter)?;
            report.empty_files.clone_from(&rows.empty_files);
            let made = std::mem::replace(&mut report.bad, rows.bad.clone());
            report.bad.merge(made);
            checked(files, report)
        }
    }
}

fn checked(files: &[PathBuf], report: RowReport) -> Result<RowReport, DataError> {
    match report.rows {
        0 => Err(no_rows(files, &report)),
        _ => Ok(report),
    }
}

fn encoded(batch: Vec<TextRow>, encoder: RowEncoder<'_>, model: &ModelConfig) -> Made {
    let mut made = Made::default();
    for row in batch {
        let place = |problem| DataError::Row {
            path: row.file.to_path_buf(),
            line: row.line,
            problem,
        };
        let Encoded { rows, cuts } = match encoder.encode(&row.text) {
            Ok(encoded) => encoded,
            Err(problem) => {
                made.push(Err(problem.into()), model, place);
                continue;
            }
        };
        made.cuts.add(cuts);
        for raw in &rows {
            made.push(Ok(raw), model, place);
        }
    }
    made
}

fn parsed(batch: Vec<TokenIdRow>, model: &ModelConfig) -> Made {
    let mut made = Made::default();
    for row in batch {
        let raw = crate::data::pretokenised::training_row(&row.line.text);
        let raw = raw.as_ref().map_err(Clone::clone);
        made.push(raw, model, |problem| DataError::Row {
            path: row.file.to_path_buf(),
            line: row.line.number,
            problem,
        });
    }
    made
}

/// What of the making of rows does not depend on what they are made of.
struct Collect {
    bad_rows: BadRows,
    bytes: u64,
    bytes_read: Arc<AtomicU64>,
}

impl Collect {
    fn new(bad_rows: BadRows, bytes: u64, bytes_read: Arc<AtomicU64>) -> Self {
        Self {
            bad_rows,
            bytes,
            bytes_read,
        }
    }

    fn run<T: Send>(
        self,
        items: &mut (impl Iterator<Item = Result<T, DataError>> + Send),
        size: impl Fn(&T) -> usize + Send,
        threads: usize,
        work: impl Fn(Vec<T>) -> Made + Sync,
        sink: &mut Sink,
        meter: &mut Meter<'_>,
    ) -> Result<RowReport, DataError> {
        let mut report = RowReport {
            bad: BadRowLog::new(self.bad_rows),
            ..RowReport::default()
        };
        meter.begin(Phase::Tokenising, self.bytes);
        // Both what takes rows and what waits for them tell the progress.
        let meter = std::cell::RefCell::new(meter);
        let read = || self.bytes_read.load(Ordering::Relaxed);
        let take = |made: Made| {
            for (before, error) in made.bad {
                report.bad.reject(error, report.rows + before)?;
            }
            report.rows += made.rows.len();
            report.cuts.add(made.cuts);
            sink.append(&made.rows)?;
            let tokens: u64 = made.rows.entries().map(|row| u64::from(row.tokens)).sum();
            meter.borrow_mut().update(|progress| {
                progress.bytes_done = read();
                progress.rows = report.rows as u64;
                progress.tokens += tokens;
            })
        };
        let idle = || {
            let mut meter = meter.borrow_mut();
            meter.update(|progress| progress.bytes_done = read())
        };
        in_order(items, size, threads, work, take, idle)?;
        meter.into_inner().finish()?;
        Ok(report)
    }
}
