//! Reader of rows that are token ids already: JSONL, one object per line.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::rows::{PromptRow, RawRow, Rows};
use super::{DataError, RowProblem};
use crate::config::model::ModelConfig;

mod lines;

pub(super) use lines::{Line, Lines};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TrainingLine {
    input_ids: Vec<i64>,
    labels: Vec<i64>,
    context_length: Option<usize>,
    position_ids: Option<[Vec<u32>; 2]>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PromptLine {
    input_ids: Vec<i64>,
    context_length: Option<usize>,
    position_ids: Option<[Vec<u32>; 2]>,
}

/// Reads training rows into memory: `input_ids`, `labels` (-100: no target), and where they do not
/// follow from sop and mask token `context_length` and `position_ids` (two lists).
///
/// # Errors
/// The first row that cannot be used, with file and line; a file that cannot be read or has no row.
pub fn read_rows(path: &Path, model: &ModelConfig) -> Result<Rows, DataError> {
    let mut rows = Rows::default();
    for_each_line(path, |line| rows.push(&training_row(line)?, model))?;
    Ok(rows)
}

/// Reads prompts: as [`read_rows`], without `labels`.
pub fn read_prompts(path: &Path, model: &ModelConfig) -> Result<Vec<PromptRow>, DataError> {
    let mut prompts = Vec::new();
    for_each_line(path, |line| {
        let line: PromptLine = parse(line)?;
        let row = RawRow {
            input_ids: line.input_ids,
            labels: Vec::new(),
            context_length: line.context_length,
            position_ids: line.position_ids,
        };
        prompts.push(PromptRow::new(&row, model)?);
        Ok(())
    })?;
    Ok(prompts)
}

/// Whether a file's first row is one of token ids: an object with `input_ids`.
///
/// # Errors
/// The file cannot be read.
pub fn holds_token_ids(path: &Path) -> Result<bool, DataError> {
    let first = Lines::open(path, &Arc::default())?.next();
    Ok(match first {
        Some(Ok(line)) => {
            let columns = serde_json::from_str::<serde_json::Map<String, serde_json::Value>>;
            match columns(&line.text) {
                Ok(columns) => columns.contains_key("input_ids"),
                // Which kind of row was begun here is all that can be told.
                Err(_) => line.text.starts_with('{') && line.text.contains("\"input_ids\""),
            }
        }
        // What is no text, or too long, is reported by whoever reads the file.
        Some(Err(DataError::Row { .. })) | None => false,
        Some(Err(error)) => return Err(error),
    })
}

/// The training row on a line.
///
/// # Errors
/// What is wrong with the line.
pub(super) fn training_row(line: &str) -> Result<RawRow, RowProblem> {
    let line: TrainingLine = parse(line)?;
    Ok(RawRow {
        input_ids: line.input_ids,
        labels: line.labels,
        context_length: line.context_length,
        position_ids: line.position_ids,
    })
}

fn for_each_line(
    path: &Path,
    mut take: impl FnMut(&str) -> Result<(), RowProblem>,
) -> Result<(), DataError> {
    let mut any = false;
    for line in Lines::open(path, &Arc::<AtomicU64>::default())? {
        let line = line?;
        take(&line.text).map_err(|problem| DataError::Row {
            path: path.to_owned(),
            line: line.number,
            problem,
        })?;
        any = true;
    }
    match any {
        true => Ok(()),
        false => Err(DataError::NoRows {
            path: PathBuf::from(path),
        }),
    }
}

/// The parser counts lines inside the text it is given, which is one line of the file.
fn parse<Line: DeserializeOwned>(line: &str) -> Result<Line, RowProblem> {
    serde_json::from_str(line).map_err(|error| {
        let column = error.column();
        let message = error.to_string();
        let place = format!(" at line {} column {column}", error.line());
        let message = message.strip_suffix(&place).unwrap_or(&message).to_owned();
        RowProblem::Json { message, column }
    })
}
