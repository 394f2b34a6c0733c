//! Reader of rows that are token ids already: JSONL, one object per line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::rows::{PromptRow, RawRow, Rows};
use super::{DataError, RowProblem};
use crate::config::model::ModelConfig;

/// Longest line that is read. The longest sensible row, four lists of 32,768 ids of six digits, is
/// well below a megabyte; the limit keeps a file without line breaks out of memory.
const LINE_LIMIT: usize = 16 << 20;

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

/// Reads training rows: `input_ids`, `labels` (-100: no target), and where they do not follow from
/// sop and mask token `context_length` and `position_ids` (two lists).
///
/// # Errors
/// The first row that cannot be used, with file and line; a file that cannot be read or has no row.
pub fn read_rows(path: &Path, model: &ModelConfig) -> Result<Rows, DataError> {
    let mut rows = Rows::default();
    for_each_line(path, |line: TrainingLine| {
        let row = RawRow {
            input_ids: line.input_ids,
            labels: line.labels,
            context_length: line.context_length,
            position_ids: line.position_ids,
        };
        rows.push(&row, model)
    })?;
    Ok(rows)
}

/// Reads prompts: as [`read_rows`], without `labels`.
pub fn read_prompts(path: &Path, model: &ModelConfig) -> Result<Vec<PromptRow>, DataError> {
    let mut prompts = Vec::new();
    for_each_line(path, |line: PromptLine| {
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

/// Gives every line of the file to `take`. A byte order mark, carriage returns and blank lines at
/// the end are passed over.
fn for_each_line<Line: DeserializeOwned>(
    path: &Path,
    mut take: impl FnMut(Line) -> Result<(), RowProblem>,
) -> Result<(), DataError> {
    let io = |source| DataError::Io {
        path: path.to_owned(),
        source,
    };
    let mut file = BufReader::new(File::open(path).map_err(io)?);
    let mut bytes = Vec::new();
    let (mut number, mut any, mut blank) = (0, false, None);
    loop {
        bytes.clear();
        let mut rest = (&mut file).take(LINE_LIMIT as u64 + 1);
        if rest.read_until(b'\n', &mut bytes).map_err(io)? == 0 {
            break;
        }
        number += 1;
        let at = |line| {
            move |problem| DataError::Row {
                path: path.to_owned(),
                line,
                problem,
            }
        };
        if bytes.len() > LINE_LIMIT {
            return Err(at(number)(RowProblem::LineTooLong { limit: LINE_LIMIT }));
        }
        let text = text(&bytes, number == 1).map_err(at(number))?;
        if text.is_empty() {
            blank = blank.or(Some(number));
            continue;
        }
        if let Some(blank) = blank {
            return Err(at(blank)(RowProblem::Blank));
        }
        let line = serde_json::from_str(text).map_err(|error| at(number)(json_problem(&error)))?;
        take(line).map_err(at(number))?;
        any = true;
    }
    if !any {
        return Err(DataError::NoRows {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// The line as text, without a byte order mark and white space around it.
fn text(bytes: &[u8], first: bool) -> Result<&str, RowProblem> {
    let text = std::str::from_utf8(bytes).map_err(|error| RowProblem::NotUtf8 {
        byte: error.valid_up_to(),
    })?;
    let text = match text.strip_prefix('\u{feff}') {
        Some(rest) if first => rest,
        _ => text,
    };
    Ok(text.trim_matches([' ', '\t', '\r', '\n']))
}

/// The parser counts lines inside the text it is given, which is one line of the file.
fn json_problem(error: &serde_json::Error) -> RowProblem {
    let column = error.column();
    let message = error.to_string();
    let place = format!(" at line {} column {column}", error.line());
    let message = message.strip_suffix(&place).unwrap_or(&message).to_owned();
    RowProblem::Json { message, column }
}
