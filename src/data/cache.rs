//! Rows tokenised once: a file that is mapped into memory, named by what went into it.
//!
//! A cache file belongs to the contents of the data files, the tokenizer and every setting that
//! decides what rows become; when one of these changes it is another file. It is written beside its
//! place and renamed when it is whole; one that is not whole, or not what its name says, is made
//! anew. Data, tokens and rows may be far larger than memory.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::rows::{RowBlock, Rows, Store};
use super::source::find_files;
use super::template::TemplateSettings;
use super::text_rows::{BadRows, RowReport, TextSettings};
use super::tokenizer::GlmTokenizer;
use super::{DataError, FileProblem};
use crate::config::model::ModelConfig;

mod build;
mod digest;
mod key;
mod lock;
mod mapped;
mod ordered;
mod progress;
mod token_id_rows;
mod writer;

use build::Sink;
use key::CacheKey;
use lock::BuildLock;
pub(super) use mapped::MappedRows;
use mapped::Unusable;
use progress::Meter;
pub use progress::{Phase, Progress};
use writer::CacheWriter;

/// What rows are made of.
#[derive(Clone, Copy, Debug)]
pub enum RowKind<'a> {
    /// Text.
    Text {
        /// How it is read and what it becomes.
        settings: &'a TextSettings,
        /// What makes ids of it.
        tokenizer: &'a GlmTokenizer,
    },
    /// Token ids, as [`super::pretokenised`] reads them.
    TokenIds {
        /// What happens to rows that cannot be used.
        bad_rows: BadRows,
    },
}

impl RowKind<'_> {
    fn reads_plain_text(&self) -> bool {
        match self {
            Self::Text { settings, .. } => reads_plain_text(&settings.template),
            Self::TokenIds { .. } => false,
        }
    }
}

/// Whether a template can read text that has no columns.
pub(super) fn reads_plain_text(template: &TemplateSettings) -> bool {
    template.template.plain_text().is_some()
}

/// Where rows are kept and who makes them.
#[derive(Clone, Copy, Debug)]
pub struct CacheSettings<'a> {
    /// Folder of cache files; it is made if it is not there. Without one the rows are held in
    /// memory and made in every run.
    pub folder: Option<&'a Path>,
    /// Threads that tokenise, at least one. Reading and writing take one each besides.
    pub threads: usize,
}

/// Where rows came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CacheUse {
    /// They are in memory only.
    None,
    /// The file was there.
    Found(PathBuf),
    /// The file was made.
    Made(PathBuf),
    /// The file was there, but could not be used, and was made anew.
    MadeAnew {
        /// The file.
        path: PathBuf,
        /// What was wrong with it.
        reason: String,
    },
}

/// Rows, and what was noticed while they were made, in this run or in an earlier one.
#[derive(Clone, Debug)]
pub struct Tokenised {
    /// The rows.
    pub rows: Rows,
    /// What was noticed.
    pub report: RowReport,
    /// Where they came from.
    pub cache: CacheUse,
}

/// Called every now and then while rows are made; [`ControlFlow::Break`] ends it with
/// [`DataError::Interrupted`].
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// The rows of all files, out of the cache or into it.
///
/// Any number of runs may share a folder: those that need the same file make it once.
///
/// # Errors
/// What [`super::text_rows::TextRows`] and [`super::pretokenised::read_rows`] find wrong with files
/// and rows; a cache that cannot be written; an interruption. Nothing half-made is left behind.
pub fn tokenised(
    sources: &[PathBuf],
    kind: RowKind<'_>,
    model: &ModelConfig,
    cache: CacheSettings<'_>,
    on_progress: OnProgress<'_>,
) -> Result<Tokenised, DataError> {
    let mut meter = Meter::new(on_progress);
    let files = find_files(sources, kind.reads_plain_text())?;
    let Some(folder) = cache.folder else {
        let mut sink = Sink::Memory(RowBlock::default());
        let report = build::rows(&files, kind, model, cache.threads, &mut sink, &mut meter)?;
        return Ok(in_memory(sink, report));
    };
    let key = CacheKey::of(&files, kind, model, &mut meter)?;
    let path = key.path(folder);
    if let Ok(found) = MappedRows::open(&path, key.manifest()) {
        return Ok(of_file(found, CacheUse::Found(path)));
    }
    let failed = |source| DataError::Cache {
        path: path.clone(),
        source,
    };
    let missing: Vec<&Path> = folder.ancestors().take_while(|at| !at.exists()).collect();
    std::fs::create_dir_all(folder).map_err(failed)?;
    let result = made_or_found(&files, &key, kind, model, cache.threads, folder, &mut meter);
    if result.is_err() {
        lock::remove(folder, key.name());
        for made in missing {
            // Whether it can be removed decides nothing; one that others use by now cannot.
            let _ = std::fs::remove_dir(made);
        }
    }
    result
}

/// The rows out of the file that `key` names in `folder`, after it was made if need be.
fn made_or_found(
    files: &[PathBuf],
    key: &CacheKey,
    kind: RowKind<'_>,
    model: &ModelConfig,
    threads: usize,
    folder: &Path,
    meter: &mut Meter<'_>,
) -> Result<Tokenised, DataError> {
    let path = key.path(folder);
    let failed = |source| DataError::Cache {
        path: path.clone(),
        source,
    };
    let lock = BuildLock::acquire(folder, key.name(), meter)?;
    // Another run may have made it in the meantime.
    let unusable = match MappedRows::open(&path, key.manifest()) {
        Ok(found) => return Ok(of_file(found, CacheUse::Found(path))),
        Err(unusable) => unusable,
    };
    lock.remove_leftovers(folder);
    let writer = CacheWriter::create(folder, key.name(), &path).map_err(failed)?;
    let mut sink = Sink::File(Box::new(writer), path.clone());
    let report = build::rows(files, kind, model, threads, &mut sink, meter)?;
    key.check_unchanged()?;
    let tail = key.tail(&report);
    if let Sink::File(writer, _) = sink {
        writer.finish(&tail).map_err(failed)?;
    }
    let made = MappedRows::open(&path, key.manifest()).map_err(|unusable| DataError::Cache {
        path: path.clone(),
        source: std::io::Error::other(unusable.to_string()),
    })?;
    let cache = match unusable {
        Unusable::Missing => CacheUse::Made(path),
        other => CacheUse::MadeAnew {
            path,
            reason: other.to_string(),
        },
    };
    Ok(of_file(made, cache))
}

fn of_file((mapped, report): (MappedRows, RowReport), cache: CacheUse) -> Tokenised {
    let (tokens, targets) = mapped.totals();
    Tokenised {
        rows: Rows::held(Store::Mapped(mapped.into()), tokens, targets),
        report,
        cache,
    }
}

fn in_memory(sink: Sink, report: RowReport) -> Tokenised {
    let block = match sink {
        Sink::Memory(block) => block,
        Sink::File(..) => RowBlock::default(),
    };
    let (mut tokens, mut targets) = (0, 0);
    for entry in block.entries() {
        tokens += entry.tokens as usize;
        targets += entry.targets as usize;
    }
    Tokenised {
        rows: Rows::held(Store::Memory(block.into()), tokens, targets),
        report,
        cache: CacheUse::None,
    }
}

/// What is said of files that hold no row at all.
fn no_rows(files: &[PathBuf], report: &RowReport) -> DataError {
    if report.bad.count() > 0 {
        return report.bad.no_usable_row();
    }
    DataError::File {
        path: files.first().cloned().unwrap_or_default(),
        problem: FileProblem::NoRows,
    }
}
