//! The rows of a run: found, told apart, tokenised or taken from the cache, split.

use std::path::{Path, PathBuf};

use super::DataError;
use super::cache::{
    CacheSettings, CacheUse, OnProgress, RowKind, Tokenised, reads_plain_text, tokenised,
};
use super::pretokenised::holds_token_ids;
use super::rows::Rows;
use super::sampler::{EpochOrder, Order};
use super::source::find_files;
use super::template::TemplateSettings;
use super::text_rows::{BadRows, RowReport, TextSettings};
use super::tokenizer::GlmTokenizer;
use crate::config::model::ModelConfig;

/// What a run's rows are.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSettings {
    /// Files, folders and patterns of training data: text, or token ids if the first row of the
    /// first file has `input_ids`.
    pub train: Vec<PathBuf>,
    /// The same of validation data; empty if there is none.
    pub validation: Vec<PathBuf>,
    /// Share of the training rows that is kept for validation, 0 for none.
    pub validation_split: f64,
    /// Decides which rows are kept.
    pub seed: u64,
    /// What rows of text become.
    pub template: TemplateSettings,
    /// What happens to rows that cannot be used.
    pub bad_rows: BadRows,
    /// Folder of cache files; without one all rows are held in memory.
    pub cache_dir: Option<PathBuf>,
    /// Whether rows of token ids go into the cache too; they are read about as fast as they are.
    pub cache_token_ids: bool,
    /// Threads that tokenise.
    pub threads: usize,
}

/// The rows of a run.
#[derive(Clone, Debug)]
pub struct TrainingData {
    /// What is trained on.
    pub train: Rows,
    /// What the model is tried on; none of it is trained on. In the order of the files.
    pub validation: Option<Rows>,
    /// What was noticed in the training files.
    pub report: RowReport,
    /// What was noticed in the validation files, if there are any.
    pub validation_report: Option<RowReport>,
    /// Where the training rows came from.
    pub cache: CacheUse,
    /// Whether the training files hold token ids rather than text.
    pub holds_token_ids: bool,
}

impl TrainingData {
    /// What the user should know of the files: rows left out, columns named twice, files without rows,
    /// a cache that was of no use.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = self.report.notices();
        notices.extend(self.validation_report.iter().flat_map(RowReport::notices));
        if let CacheUse::MadeAnew { path, reason } = &self.cache {
            let path = path.display();
            notices.push(format!(
                "{path}: made anew, because the cache there was of no use: {reason}"
            ));
        }
        notices
    }
}

/// Opens a run's data. Text needs the tokenizer, token ids do without.
///
/// # Errors
/// As [`tokenised`]; text without a tokenizer; a share for validation that cannot be split off.
pub fn open_training_data(
    settings: &DataSettings,
    tokenizer: Option<&GlmTokenizer>,
    model: &ModelConfig,
    on_progress: OnProgress<'_>,
) -> Result<TrainingData, DataError> {
    if settings.validation_split != 0.0 && !settings.validation.is_empty() {
        return Err(DataError::ValidationTwice);
    }
    let mut open =
        |sources: &[PathBuf]| open_rows(sources, settings, tokenizer, model, &mut *on_progress);
    let (train, holds_token_ids) = open(&settings.train)?;
    let validation = match settings.validation.as_slice() {
        [] => None,
        files => Some(open(files)?.0),
    };
    let mut data = TrainingData {
        train: train.rows,
        validation: None,
        report: train.report,
        validation_report: None,
        cache: train.cache,
        holds_token_ids,
    };
    if let Some(validation) = validation {
        data.validation = Some(validation.rows);
        data.validation_report = Some(validation.report);
    } else if settings.validation_split != 0.0 {
        let (train, validation) = split(&data.train, settings.validation_split, settings.seed)?;
        data.train = train;
        data.validation = Some(validation);
    }
    Ok(data)
}

fn open_rows(
    sources: &[PathBuf],
    settings: &DataSettings,
    tokenizer: Option<&GlmTokenizer>,
    model: &ModelConfig,
    on_progress: OnProgress<'_>,
) -> Result<(Tokenised, bool), DataError> {
    let cache = CacheSettings {
        folder: settings.cache_dir.as_deref(),
        threads: settings.threads,
    };
    let files = find_files(sources, reads_plain_text(&settings.template))?;
    let first = files.first().map_or(Path::new(""), PathBuf::as_path);
    if holds_token_ids(first)? {
        let bad_rows = settings.bad_rows;
        let kind = RowKind::TokenIds { bad_rows };
        let folder = cache.folder.filter(|_| settings.cache_token_ids);
        let cache = CacheSettings { folder, ..cache };
        return Ok((tokenised(sources, kind, model, cache, on_progress)?, true));
    }
    let Some(tokenizer) = tokenizer else {
        let path = first.to_owned();
        let is_empty = std::fs::metadata(first).is_ok_and(|file| file.len() == 0);
        return Err(match is_empty {
            true => DataError::NoRows { path },
            false => DataError::NoTokenizer { path },
        });
    };
    let text = TextSettings {
        template: settings.template.clone(),
        bad_rows: settings.bad_rows,
        ..TextSettings::default()
    };
    let kind = RowKind::Text {
        settings: &text,
        tokenizer,
    };
    Ok((tokenised(sources, kind, model, cache, on_progress)?, false))
}

/// An epoch that is never trained: its order says which rows are kept for validation.
const SPLIT_EPOCH: u64 = u64::MAX;

/// Training and validation rows: of `share` of the rows, chosen by the seed, at least one.
fn split(rows: &Rows, share: f64, seed: u64) -> Result<(Rows, Rows), DataError> {
    let count = rows.len();
    let kept = ((count as f64 * share).round() as usize).max(1);
    if !(share > 0.0 && share < 1.0) || kept >= count {
        return Err(DataError::Split { share, rows: count });
    }
    let mut order = EpochOrder::new(Order::Shuffled { seed }, SPLIT_EPOCH, count);
    Ok(rows.split_off((0..kept).map(|place| order.at(place)).collect()))
}
