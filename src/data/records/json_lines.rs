//! One JSON object per line; and what both JSON readers share: a row's bytes to its columns.

use super::columns::{Columns, parser_error};
use super::{Content, Input, ReadError, Record, RowBytes, utf8};
use crate::data::{RowProblem, TextProblem};

/// Reader of one object per line. Blank lines are passed over.
pub(super) struct JsonLines;

impl JsonLines {
    pub(super) fn next(
        &mut self,
        input: &mut Input,
        limit: usize,
    ) -> Result<Option<Record>, ReadError> {
        loop {
            let mut row = RowBytes::new(input.line(), limit);
            let mut read = input.read_line(limit.saturating_add(1), &mut row.kept)?;
            if read == 0 {
                return Ok(None);
            }
            row.count(read)?;
            let content = row.kept.trim_ascii();
            if content.is_empty() && row.kept.ends_with(b"\n") {
                continue;
            }
            if !row.is_too_long() {
                if content.is_empty() {
                    return Ok(None);
                }
                let columns = parse(&row.kept, row.line, 1)?;
                return Ok(Some(Record {
                    line: row.line,
                    content: Content::Columns(columns),
                }));
            }
            let error = row.too_long();
            let mut ended = row.kept.ends_with(b"\n");
            while !ended && read > 0 {
                row.kept.clear();
                read = input.read_line(limit, &mut row.kept)?;
                row.count(read)?;
                ended = row.kept.ends_with(b"\n");
            }
            return Err(error);
        }
    }
}

/// The columns of a JSON object whose text begins at `line` and `column`.
pub(super) fn parse(bytes: &[u8], line: usize, column: usize) -> Result<Columns, ReadError> {
    let text = utf8(bytes, line, column)?;
    let row_error = |line, problem| ReadError::Row { line, problem };
    if let Some(found) = other_than_object(text) {
        return Err(row_error(line, TextProblem::NotAnObject { found }.into()));
    }
    serde_json::from_str(text).map_err(|error| {
        let (message, error_line, error_column) = parser_error(&error);
        // The first line of the text may begin in the middle of one of the file.
        let before = if error_line <= 1 { column - 1 } else { 0 };
        row_error(
            line + error_line.saturating_sub(1),
            RowProblem::Json {
                message,
                column: error_column + before,
            },
        )
    })
}

/// What a JSON value is, unless it begins as an object or as nothing at all.
fn other_than_object(text: &str) -> Option<&'static str> {
    match text.trim_ascii_start().bytes().next()? {
        b'[' => Some("a list"),
        b'"' => Some("text"),
        b'n' => Some("null"),
        b't' | b'f' => Some("true or false"),
        b'-' | b'0'..=b'9' => Some("a number"),
        _ => None,
    }
}
