//! Tables: RFC 4180, read as forgivingly as Python's `csv`, but for a quote that is never closed
//! and for rows that do not fit the header.

use std::ops::Range;

use super::{Columns, Content, Field, Input, ReadError, Record, RowBytes};
use crate::data::{FileProblem, TextProblem};

/// Longest header that is read, in bytes, and most columns.
const MAX_HEADER_BYTES: usize = 1 << 20;
const MAX_COLUMNS: usize = 1024;

/// Reader of a table. Blank lines are passed over.
pub(super) struct Csv {
    delimiter: u8,
    header: Option<Vec<String>>,
}

/// The fields of a line, quotes taken off: where each ends in the kept bytes, and how many there
/// are, which may be more.
struct Line {
    row: RowBytes,
    ends: Vec<usize>,
    fields: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Before the first byte of a field.
    Start,
    /// In a field without quotes, or behind a quoted part.
    Plain,
    /// Inside quotes.
    Quoted,
    /// Behind a quote inside quotes: the end of the quoted part, or half of a doubled quote.
    AfterQuote,
}

impl Csv {
    pub(super) fn new(delimiter: u8) -> Self {
        Self {
            delimiter,
            header: None,
        }
    }

    pub(super) fn delimiter(&self) -> u8 {
        self.delimiter
    }

    pub(super) fn header(&self) -> Option<&[String]> {
        self.header.as_deref()
    }

    /// Reads the first line; of an empty file nothing.
    pub(super) fn read_header(&mut self, input: &mut Input) -> Result<(), ReadError> {
        let Some(line) = self.read_line(input, MAX_HEADER_BYTES, MAX_COLUMNS)? else {
            return Ok(());
        };
        let at = line.row.line;
        let unreadable = |message| ReadError::Broken {
            line: at,
            problem: FileProblem::Header { message },
        };
        if line.row.is_too_long() || line.fields > MAX_COLUMNS {
            return Err(unreadable(format!(
                "it has more than {MAX_HEADER_BYTES} bytes or {MAX_COLUMNS} columns"
            )));
        }
        let text = std::str::from_utf8(&line.row.kept)
            .map_err(|_| unreadable("it is not UTF-8; save the file as UTF-8".to_owned()))?;
        // The fields end where an ASCII byte was, so that no character is cut.
        let name = |place: Range<usize>| text.get(place).unwrap_or_default().trim().to_owned();
        self.header = Some(line.places().map(name).collect());
        Ok(())
    }

    pub(super) fn next(
        &mut self,
        input: &mut Input,
        limit: usize,
    ) -> Result<Option<Record>, ReadError> {
        let Some(header) = &self.header else {
            return Ok(None);
        };
        let expected = header.len();
        let Some(line) = self.read_line(input, limit, expected)? else {
            return Ok(None);
        };
        let at = line.row.line;
        if line.row.is_too_long() {
            return Err(line.row.too_long());
        }
        if line.fields != expected {
            let found = line.fields;
            return Err(ReadError::Row {
                line: at,
                problem: TextProblem::Fields { found, expected }.into(),
            });
        }
        let mut columns = Columns::default();
        for (name, place) in header.iter().zip(line.places()) {
            let text = std::str::from_utf8(&line.row.kept[place]);
            let text = text.map_err(|_| ReadError::Row {
                line: at,
                problem: TextProblem::NotUtf8 {
                    column: name.clone(),
                }
                .into(),
            })?;
            columns.set(name.clone(), Field::Text(text.to_owned()));
        }
        Ok(Some(Record {
            line: at,
            content: Content::Columns(columns),
        }))
    }

    /// The next line that is not blank, at most `most` of its fields kept.
    fn read_line(
        &self,
        input: &mut Input,
        limit: usize,
        most: usize,
    ) -> Result<Option<Line>, ReadError> {
        let mut line = Line {
            row: RowBytes::new(input.line(), limit),
            ends: Vec::new(),
            fields: 0,
        };
        let mut state = State::Start;
        let mut quote_line = 0;
        loop {
            let at = input.line();
            let byte = input.next_byte()?;
            state = match (state, byte) {
                (State::Quoted, None) => {
                    return Err(ReadError::Broken {
                        line: quote_line,
                        problem: FileProblem::OpenQuote,
                    });
                }
                (State::Quoted, Some(b'"')) => State::AfterQuote,
                (State::Quoted, Some(byte)) => {
                    line.row.push(byte)?;
                    State::Quoted
                }
                (State::Start, Some(b'\r' | b'\n')) if line.fields == 0 => {
                    line.row.line = input.line();
                    State::Start
                }
                (State::Start, None) if line.fields == 0 => return Ok(None),
                (_, None | Some(b'\r' | b'\n')) => {
                    line.end_field(most)?;
                    return Ok(Some(line));
                }
                (_, Some(byte)) if byte == self.delimiter => {
                    line.end_field(most)?;
                    State::Start
                }
                (State::Start, Some(b'"')) => {
                    quote_line = at;
                    State::Quoted
                }
                (State::AfterQuote, Some(b'"')) => {
                    line.row.push(b'"')?;
                    State::Quoted
                }
                (_, Some(byte)) => {
                    line.row.push(byte)?;
                    State::Plain
                }
            };
        }
    }
}

impl Line {
    fn end_field(&mut self, most: usize) -> Result<(), ReadError> {
        self.fields += 1;
        if self.fields <= most {
            self.ends.push(self.row.kept.len());
        }
        // A line of delimiters only is as long as any other.
        self.row.count(usize::from(self.fields > most))
    }

    /// Where the fields are in the kept bytes.
    fn places(&self) -> impl Iterator<Item = Range<usize>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        starts
            .zip(self.ends.iter().copied())
            .map(|(start, end)| start..end)
    }
}
