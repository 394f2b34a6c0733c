//! The lines of a JSONL file, one in memory at a time, of which no more than a limit.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::data::source::{Input, OpenFile, gzip_problem};
use crate::data::{DataError, RowProblem};

/// Longest line that is read. The longest sensible row, four lists of 32,768 ids of six digits, is
/// well below a megabyte; the limit keeps a file without line breaks out of memory.
const LINE_LIMIT: usize = 16 << 20;

/// A line that is not blank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::data) struct Line {
    /// Number of the line, from 1.
    pub number: usize,
    /// What it says, without white space around it.
    pub text: String,
}

/// The lines of one file. A byte order mark, carriage returns and blank lines at the end are passed
/// over. After a [`DataError::Row`] the next line follows; any other error ends the lines.
pub(in crate::data) struct Lines {
    path: PathBuf,
    input: Input,
    gzip: bool,
    /// The first of the blank lines just passed.
    blank: Option<usize>,
    /// What follows blank lines, about which a word has to be said first.
    held: Option<(usize, Result<Line, RowProblem>)>,
    /// Whether the rest of a line that is too long lies ahead.
    skipping: bool,
    ended: bool,
}

impl Lines {
    /// Opens a file, compressed or not; bytes read from the disk are added to `bytes_read`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn open(path: &Path, bytes_read: &Arc<AtomicU64>) -> Result<Self, DataError> {
        let open = OpenFile::new(path, &["input_ids"], true, bytes_read)?;
        Ok(Self {
            path: path.to_owned(),
            input: open.input,
            gzip: open.gzip,
            blank: None,
            held: None,
            skipping: false,
            ended: false,
        })
    }

    fn row_error(&self, line: usize, problem: RowProblem) -> DataError {
        DataError::Row {
            path: self.path.clone(),
            line,
            problem,
        }
    }

    /// The next line that is not blank, with its number.
    fn read(&mut self) -> std::io::Result<Option<(usize, Result<Line, RowProblem>)>> {
        loop {
            let mut bytes = Vec::new();
            while self.skipping {
                bytes.clear();
                let read = self.input.read_line(1 << 16, &mut bytes)?;
                self.skipping = read > 0 && !bytes.ends_with(b"\n");
            }
            bytes.clear();
            let number = self.input.line();
            if self.input.read_line(LINE_LIMIT + 1, &mut bytes)? == 0 {
                return Ok(None);
            }
            if bytes.len() > LINE_LIMIT {
                self.skipping = !bytes.ends_with(b"\n");
                let problem = RowProblem::LineTooLong { limit: LINE_LIMIT };
                return Ok(Some((number, Err(problem))));
            }
            let line = match std::str::from_utf8(&bytes) {
                Ok(text) => Ok(text.trim_matches([' ', '\t', '\r', '\n']).to_owned()),
                Err(error) => Err(RowProblem::NotUtf8 {
                    byte: error.valid_up_to(),
                }),
            };
            if line.as_ref().is_ok_and(String::is_empty) {
                self.blank = self.blank.or(Some(number));
                continue;
            }
            return Ok(Some((number, line.map(|text| Line { number, text }))));
        }
    }
}

impl Iterator for Lines {
    type Item = Result<Line, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some((number, line)) = self.held.take() {
            return Some(line.map_err(|problem| self.row_error(number, problem)));
        }
        if self.ended {
            return None;
        }
        match self.read() {
            Ok(Some((number, line))) => match self.blank.take() {
                Some(blank) => {
                    self.held = Some((number, line));
                    Some(Err(self.row_error(blank, RowProblem::Blank)))
                }
                None => Some(line.map_err(|problem| self.row_error(number, problem))),
            },
            Ok(None) => {
                self.ended = true;
                None
            }
            Err(source) => {
                self.ended = true;
                let path = self.path.clone();
                Some(Err(match self.gzip {
                    true => DataError::Broken {
                        path,
                        line: self.input.line(),
                        problem: gzip_problem(&source),
                    },
                    false => DataError::Io { path, source },
                }))
            }
        }
    }
}
