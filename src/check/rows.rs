//! The rows: which cannot be used, what is cut, how long they are, which are there twice.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::model::Model;
use super::{About, EXAMPLES, Finding, Report, Severity};
use crate::config::run::RunConfig;
use crate::data::DataError;
use crate::data::cache::OnProgress;
use crate::data::rows::Rows;
use crate::data::text_rows::{BadRowLog, BadRows, RowReport, TextRows, TextSettings};
use crate::data::tokenizer::GlmTokenizer;
use crate::data::training_data::{DataSettings, TrainingData, open_training_data};
use crate::pipeline::prepare::data_settings;

/// Looks at all rows; `None` where none of them could be made ids.
pub(super) fn check(
    report: &mut Report,
    config: &RunConfig,
    model: Option<&Model>,
    tokenizer: Option<&GlmTokenizer>,
    on_progress: OnProgress<'_>,
) -> Option<TrainingData> {
    let settings = data_settings(config);
    let opened = model.map(|model| open(report, &settings, model, tokenizer, on_progress));
    let data = match opened {
        Some(Ok(data)) => data,
        Some(Err(DataError::Interrupted)) => return None,
        Some(Err(error)) => {
            let is_text = matches!(error, DataError::NoTokenizer { .. });
            report.problem(About::Rows, error);
            if is_text {
                text_alone(report, &settings);
            }
            return None;
        }
        None => {
            text_alone(report, &settings);
            return None;
        }
    };
    noticed(report, About::Rows, &data.report, settings.bad_rows);
    if let Some(validation) = &data.validation_report {
        noticed(report, About::ValidationRows, validation, settings.bad_rows);
    }
    measured(report, About::Rows, &data.train);
    let first = repeated(report, &data.train);
    if let Some(validation) = &data.validation {
        measured(report, About::ValidationRows, validation);
        shared(report, &first, validation);
    }
    Some(data)
}

/// The rows as a run opens them, by its cache; where a bad row or a folder without room would end it, all
/// that can be used in memory, with the bad ones counted.
fn open(
    report: &mut Report,
    settings: &DataSettings,
    model: &Model,
    tokenizer: Option<&GlmTokenizer>,
    on_progress: OnProgress<'_>,
) -> Result<TrainingData, DataError> {
    match open_training_data(settings, tokenizer, &model.config, &mut *on_progress) {
        Err(DataError::Row { .. }) => {}
        Err(error @ DataError::Cache { .. }) => report.problem(About::Output, error),
        opened => return opened,
    }
    let counting = DataSettings {
        bad_rows: BadRows::Skip,
        cache_dir: None,
        ..settings.clone()
    };
    open_training_data(&counting, tokenizer, &model.config, on_progress)
}

/// Rows of text whose ids cannot be had: their form alone.
fn text_alone(report: &mut Report, settings: &DataSettings) {
    let text = TextSettings {
        template: settings.template.clone(),
        bad_rows: BadRows::Skip,
        ..TextSettings::default()
    };
    for (about, sources) in [
        (About::Rows, &settings.train),
        (About::ValidationRows, &settings.validation),
    ] {
        if sources.is_empty() {
            continue;
        }
        let mut rows = match TextRows::open(sources, &text) {
            Ok(rows) => rows,
            Err(error) => {
                report.problem(about, error);
                continue;
            }
        };
        let mut count = 0;
        for row in &mut rows {
            match row {
                Ok(_) => count += 1,
                Err(error) => report.problem(about, error),
            }
        }
        report.fact(
            about,
            format!("{count} rows of text have the template's form"),
        );
        noticed(report, about, rows.report(), settings.bad_rows);
    }
}

/// What was noticed while rows were read.
fn noticed(report: &mut Report, about: About, found: &RowReport, policy: BadRows) {
    let bad = &found.bad;
    if bad.count() > 0 {
        let (severity, what) = match policy {
            BadRows::Fatal => (
                Severity::Problem,
                "rows cannot be used, and the first ends the run (--bad-rows skip leaves them out)",
            ),
            BadRows::Skip => (Severity::Warning, "rows cannot be used and are left out"),
        };
        report.findings.push(Finding {
            severity,
            about,
            count: bad.count(),
            message: format!("{} {what}", bad.count()),
            examples: bad.examples().iter().take(EXAMPLES).cloned().collect(),
        });
    }
    let others = RowReport {
        bad: BadRowLog::default(),
        ..found.clone()
    };
    for notice in others.notices() {
        report.warning(about, notice);
    }
}

/// How many rows there are, and how long.
fn measured(report: &mut Report, about: About, rows: &Rows) {
    let mut lengths: Vec<usize> = rows.lengths().collect();
    lengths.sort_unstable();
    let at = |share: f64| {
        let last = lengths.len().saturating_sub(1);
        let place = (share * last as f64).round() as usize;
        lengths.get(place).copied().unwrap_or(0)
    };
    report.fact(
        about,
        format!(
            "{} of {} to {} tokens, half of them up to {}, 95 % up to {}; {} tokens, {:.0} % of them \
             with a target",
            rows.len(),
            at(0.0),
            at(1.0),
            at(0.5),
            at(0.95),
            rows.tokens(),
            100.0 * rows.target_share()
        ),
    );
}

/// Numbers of rows, from 1, by what they say.
type Seen = HashMap<u64, usize>;

fn fingerprint(rows: &Rows, index: usize) -> Option<u64> {
    let row = rows.get(index)?;
    let mut hasher = DefaultHasher::new();
    (row.input_ids, row.labels).hash(&mut hasher);
    Some(hasher.finish())
}

/// Training rows that say what an earlier one says. The first of each.
fn repeated(report: &mut Report, rows: &Rows) -> Seen {
    let mut seen = Seen::new();
    let (mut count, mut examples) = (0, Vec::new());
    for index in 0..rows.len() {
        let Some(print) = fingerprint(rows, index) else {
            continue;
        };
        let number = index + 1;
        let first = *seen.entry(print).or_insert(number);
        if first != number {
            count += 1;
            if examples.len() < EXAMPLES {
                examples.push(format!("row {number} is row {first} again"));
            }
        }
    }
    warn_of_many(
        report,
        About::Rows,
        "rows are there more than once",
        count,
        examples,
    );
    seen
}

/// Validation rows that are trained on.
fn shared(report: &mut Report, trained: &Seen, rows: &Rows) {
    let (mut count, mut examples) = (0, Vec::new());
    for index in 0..rows.len() {
        let first = fingerprint(rows, index).and_then(|print| trained.get(&print));
        if let Some(first) = first {
            count += 1;
            if examples.len() < EXAMPLES {
                examples.push(format!(
                    "validation row {} is training row {first}",
                    index + 1
                ));
            }
        }
    }
    let what = "validation rows are trained on too, so that their loss says little";
    warn_of_many(report, About::ValidationRows, what, count, examples);
}

fn warn_of_many(
    report: &mut Report,
    about: About,
    what: &str,
    count: usize,
    examples: Vec<String>,
) {
    if count > 0 {
        report.findings.push(Finding {
            severity: Severity::Warning,
            about,
            count,
            message: format!("{count} {what}"),
            examples,
        });
    }
}
