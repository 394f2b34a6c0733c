//! Records of a file, one at a time: JSON array, JSONL, CSV, Parquet and plain text, never more in
//! memory than one record, and of that no more than a limit (of Parquet a page of each column too).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::source::{Input, OpenFile};
use super::{DataError, FileProblem, RowProblem, TextProblem};

mod columns;
mod csv;
mod json_array;
mod json_lines;
mod parquet;
mod plain_text;

pub use columns::{Columns, Field};
pub(super) use columns::{history_turns, parser_error};
use csv::Csv;
use json_array::JsonArray;
use json_lines::JsonLines;
pub(super) use parquet::MAGIC as PARQUET_MAGIC;
use parquet::Parquet;
use plain_text::PlainText;

/// What is in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One array of objects.
    JsonArray,
    /// One object per line.
    JsonLines,
    /// A table with a header.
    Csv {
        /// What stands between two fields.
        delimiter: u8,
    },
    /// A table by columns.
    Parquet,
    /// Text as it is.
    PlainText,
}

/// Where a document of a plain text file begins and ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Documents {
    /// A file is one document.
    #[default]
    File,
    /// Blank lines stand between documents.
    BlankLine,
    /// A line is a document.
    Line,
}

/// What a file gives at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Line on which it begins, of Parquet its row, from 1.
    pub line: usize,
    /// What it holds.
    pub content: Content,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// An object or a line of a table.
    Columns(Columns),
    /// A piece of a document.
    Text {
        /// The text, its line ends all line feeds.
        text: String,
        /// Whether the document begins with it.
        begins: bool,
        /// Whether the document ends with it.
        ends: bool,
    },
}

/// How far a row is followed that is longer than the limit, as a multiple of the limit, before the
/// file is given up.
const FOLLOWED: usize = 64;

/// The records of one file.
pub struct Records {
    path: PathBuf,
    input: Input,
    gzip: bool,
    reader: Reader,
    limit: usize,
    ended: bool,
}

enum Reader {
    JsonArray(JsonArray),
    JsonLines(JsonLines),
    Csv(Csv),
    Parquet(Box<Parquet>),
    PlainText(PlainText),
}

/// What a template tells the readers.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The columns that rows must have, to know a table by its header.
    pub columns: &'a [&'a str],
    /// Columns that rows may have; no others are read where columns are read one by one.
    pub optional: &'a [&'a str],
    /// Where documents end, if text without columns will do.
    pub plain_text: Option<Documents>,
    /// Longest row that is read, in bytes.
    pub max_row_bytes: usize,
}

impl Records {
    /// Opens a file; bytes read from the disk are added to `bytes_read`.
    ///
    /// # Errors
    /// A file that cannot be read, whose format cannot be told, or a table without a header.
    pub fn open(
        path: &Path,
        wanted: Wanted<'_>,
        bytes_read: &Arc<AtomicU64>,
    ) -> Result<Self, DataError> {
        let plain_text = wanted.plain_text;
        let open = OpenFile::new(path, wanted.columns, plain_text.is_some(), bytes_read)?;
        let mut records = Self {
            path: path.to_owned(),
            input: open.input,
            gzip: open.gzip,
            reader: match open.format {
                Format::JsonArray => Reader::JsonArray(JsonArray::default()),
                Format::JsonLines => Reader::JsonLines(JsonLines),
                Format::Csv { delimiter } => Reader::Csv(Csv::new(delimiter)),
                Format::Parquet => Reader::Parquet(open_parquet(path, wanted, bytes_read)?),
                Format::PlainText => {
                    Reader::PlainText(PlainText::new(plain_text.unwrap_or_default()))
                }
            },
            limit: wanted.max_row_bytes,
            ended: false,
        };
        if let Reader::Csv(csv) = &mut records.reader {
            let header = csv.read_header(&mut records.input);
            header.map_err(|error| records.located(error))?;
        }
        Ok(records)
    }

    /// What is in the file.
    pub fn format(&self) -> Format {
        match &self.reader {
            Reader::JsonArray(_) => Format::JsonArray,
            Reader::JsonLines(_) => Format::JsonLines,
            Reader::Csv(csv) => Format::Csv {
                delimiter: csv.delimiter(),
            },
            Reader::Parquet(_) => Format::Parquet,
            Reader::PlainText(_) => Format::PlainText,
        }
    }

    /// The columns of a table; `None` where rows name theirs themselves, or the table is empty.
    pub fn header(&self) -> Option<&[String]> {
        match &self.reader {
            Reader::Csv(csv) => csv.header(),
            Reader::Parquet(table) => Some(table.names()),
            _ => None,
        }
    }

    fn located(&self, error: ReadError) -> DataError {
        if let ReadError::Io(error) = &error
            && self.gzip
        {
            return DataError::Broken {
                path: self.path.clone(),
                line: self.input.line(),
                problem: super::source::gzip_problem(error),
            };
        }
        error.of(&self.path)
    }
}

fn open_parquet(
    path: &Path,
    wanted: Wanted<'_>,
    bytes_read: &Arc<AtomicU64>,
) -> Result<Box<Parquet>, DataError> {
    let reads = |name: &str| wanted.columns.contains(&name) || wanted.optional.contains(&name);
    let opened = Parquet::open(path, reads, bytes_read);
    opened.map(Box::new).map_err(|error| match error {
        ReadError::Broken { problem, .. } => DataError::File {
            path: path.to_owned(),
            problem,
        },
        other => other.of(path),
    })
}

/// After a [`DataError::Row`] the next record follows; any other error ends the file.
impl Iterator for Records {
    type Item = Result<Record, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let (input, limit) = (&mut self.input, self.limit);
        let next = match &mut self.reader {
            Reader::JsonArray(reader) => reader.next(input, limit),
            Reader::JsonLines(reader) => reader.next(input, limit),
            Reader::Csv(reader) => reader.next(input, limit),
            Reader::Parquet(reader) => reader.next(limit),
            Reader::PlainText(reader) => reader.next(input, limit),
        };
        self.ended = !matches!(next, Ok(Some(_)) | Err(ReadError::Row { .. }));
        next.map_err(|error| self.located(error)).transpose()
    }
}

/// What a reader of a format meets; the file's name is added by [`Records`].
enum ReadError {
    /// A bad row; the next one can be read.
    Row { line: usize, problem: RowProblem },
    /// Nothing more can be read.
    Broken { line: usize, problem: FileProblem },
    /// The system or the decompressor failed.
    Io(io::Error),
}

impl ReadError {
    fn of(self, path: &Path) -> DataError {
        let path = path.to_owned();
        match self {
            Self::Row { line, problem } => DataError::Row {
                path,
                line,
                problem,
            },
            Self::Broken { line, problem } => DataError::Broken {
                path,
                line,
                problem,
            },
            Self::Io(source) => DataError::Io { path, source },
        }
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The bytes of the row being read: kept up to a limit, counted beyond it.
struct RowBytes {
    line: usize,
    kept: Vec<u8>,
    seen: usize,
    limit: usize,
}

impl RowBytes {
    fn new(line: usize, limit: usize) -> Self {
        Self {
            line,
            kept: Vec::new(),
            seen: 0,
            limit,
        }
    }

    /// Adds a byte.
    fn push(&mut self, byte: u8) -> Result<(), ReadError> {
        if self.seen < self.limit {
            self.kept.push(byte);
        }
        self.count(1)
    }

    /// Counts bytes that are not kept.
    fn count(&mut self, bytes: usize) -> Result<(), ReadError> {
        self.seen += bytes;
        let bytes = self.limit.saturating_mul(FOLLOWED);
        if self.seen > bytes {
            return Err(ReadError::Broken {
                line: self.line,
                problem: FileProblem::Endless { bytes },
            });
        }
        Ok(())
    }

    fn is_too_long(&self) -> bool {
        self.seen > self.limit
    }

    /// The error for a row beyond the limit.
    fn too_long(&self) -> ReadError {
        ReadError::Row {
            line: self.line,
            problem: TextProblem::TooLong { limit: self.limit }.into(),
        }
    }
}

/// The bytes as text, which begins on `line` at `column`, or the place where they are none.
fn utf8(bytes: &[u8], line: usize, column: usize) -> Result<&str, ReadError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line_end = before.iter().rposition(|&byte| byte == b'\n');
        ReadError::Row {
            line: line + before.iter().filter(|&&byte| byte == b'\n').count(),
            problem: RowProblem::NotUtf8 {
                byte: line_end.map_or(column - 1 + before.len(), |end| before.len() - end - 1),
            },
        }
    })
}
