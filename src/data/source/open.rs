//! One file, opened: decompressed, without its byte order mark, its format known.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::bufread::MultiGzDecoder;

use super::{NamedKind, is_named_gzip, problem};
use crate::data::records::{Format, PARQUET_MAGIC};
use crate::data::text_error::Names;
use crate::data::{DataError, FileProblem};

/// As much of a file as is looked at to tell its format.
const HEAD: usize = 4096;
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// A file whose format is known, at its first byte.
pub struct OpenFile {
    /// The bytes, decompressed.
    pub input: Input,
    /// What they are.
    pub format: Format,
    /// Whether they come out of a decompressor.
    pub gzip: bool,
}

impl OpenFile {
    /// Opens a file for a template that looks for `columns` and, with `plain_text`, takes text that
    /// has none. Bytes read from the disk are added to `bytes_read`.
    ///
    /// # Errors
    /// A file that cannot be read, is UTF-16 or damaged, or whose format cannot be told.
    pub fn new(
        path: &Path,
        columns: &[&str],
        plain_text: bool,
        bytes_read: &Arc<AtomicU64>,
    ) -> Result<Self, DataError> {
        let counted = bytes_read.load(Ordering::Relaxed);
        let file = File::open(path).map_err(|error| super::io(path, error))?;
        let mut file = BufReader::new(Counted {
            file,
            bytes_read: Arc::clone(bytes_read),
        });
        // A buffer is filled by one read of the disk, which of a regular file brings all of it.
        let start = file.fill_buf().map_err(|error| super::io(path, error))?;
        let gzip = start.starts_with(&GZIP);
        if !gzip && !start.is_empty() && is_named_gzip(path) {
            return Err(problem(path, FileProblem::NotGzip));
        }
        let mut bytes: Box<dyn Read + Send> = if gzip {
            Box::new(MultiGzDecoder::new(file))
        } else {
            Box::new(file)
        };
        let mut head = Vec::with_capacity(HEAD);
        let read = (&mut bytes).take(HEAD as u64).read_to_end(&mut head);
        read.map_err(|error| match gzip {
            true => problem(path, gzip_problem(&error)),
            false => super::io(path, error),
        })?;
        if head.starts_with(&[0xff, 0xfe]) || head.starts_with(&[0xfe, 0xff]) {
            return Err(problem(path, FileProblem::Utf16));
        }
        // Its pages are compressed by themselves, and read where they are wanted.
        let parquet = (NamedKind::of(path), head.starts_with(&PARQUET_MAGIC));
        if let Some(format) = match parquet {
            (Some(NamedKind::Parquet), true) if !gzip => Some(Format::Parquet),
            (Some(NamedKind::Parquet), _) if !head.is_empty() => {
                return Err(problem(path, FileProblem::NotParquet));
            }
            (_, true) => return Err(problem(path, FileProblem::NamedOtherwise)),
            _ => None,
        } {
            // Its reader counts from the start.
            bytes_read.store(counted, Ordering::Relaxed);
            return Ok(Self {
                input: Input::new(Box::new(io::empty())),
                format,
                gzip,
            });
        }
        if head.starts_with("\u{feff}".as_bytes()) {
            head.drain(..3);
        }
        let format = match (NamedKind::of(path), significant(&head, 0)) {
            (Some(NamedKind::Json), Some((_, b'['))) => Format::JsonArray,
            (Some(NamedKind::Json), _) => Format::JsonLines,
            (Some(NamedKind::Csv { delimiter }), _) => Format::Csv { delimiter },
            (Some(NamedKind::Text), _) if plain_text => Format::PlainText,
            _ => match by_content(&head, columns) {
                Some(format) => format,
                None if plain_text => Format::PlainText,
                None => {
                    let columns: Names = columns.iter().collect();
                    return Err(problem(path, FileProblem::UnknownFormat { columns }));
                }
            },
        };
        Ok(Self {
            input: Input::new(Box::new(io::Cursor::new(head).chain(bytes))),
            format,
            gzip,
        })
    }
}

/// The first byte from `from` on that is no white space, with its place.
fn significant(bytes: &[u8], from: usize) -> Option<(usize, u8)> {
    let rest = bytes.iter().copied().enumerate().skip(from);
    rest.clone().find(|(_, byte)| !byte.is_ascii_whitespace())
}

/// The format of bytes whose name tells nothing; `None` for what can only be plain text.
fn by_content(head: &[u8], columns: &[&str]) -> Option<Format> {
    let Some((place, first)) = significant(head, 0) else {
        return Some(Format::JsonLines);
    };
    match (first, significant(head, place + 1)) {
        (b'{', Some((_, b'"' | b'}'))) => return Some(Format::JsonLines),
        (b'[', Some((_, b'{' | b']'))) => return Some(Format::JsonArray),
        _ => {}
    }
    let header = head[place..].split(|byte| b"\r\n".contains(byte)).next()?;
    let header = std::str::from_utf8(header).ok()?;
    let has_column = |delimiter: &u8| {
        let mut names = header.split(char::from(*delimiter));
        names.any(|name| columns.contains(&name.trim().trim_matches('"')))
    };
    let delimiter = [b',', b'\t'].into_iter().find(has_column)?;
    Some(Format::Csv { delimiter })
}

/// What an error of the decompressor says of the file.
pub fn gzip_problem(error: &io::Error) -> FileProblem {
    let message = match error.kind() {
        io::ErrorKind::UnexpectedEof => "it ends early".to_owned(),
        _ => error.to_string(),
    };
    FileProblem::Gzip { message }
}

/// Counts what is read from the disk, for whoever shows the progress.
struct Counted {
    file: File,
    bytes_read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.bytes_read.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// The bytes of a file, with the place of the next one.
pub struct Input {
    reader: BufReader<Box<dyn Read + Send>>,
    line: usize,
    column: usize,
}

impl Input {
    pub(super) fn new(bytes: Box<dyn Read + Send>) -> Self {
        Self {
            reader: BufReader::with_capacity(1 << 16, bytes),
            line: 1,
            column: 1,
        }
    }

    /// Line of the next byte, from 1.
    pub fn line(&self) -> usize {
        self.line
    }

    /// Column of the next byte, in bytes, from 1.
    pub fn column(&self) -> usize {
        self.column
    }

    /// The next byte, which stays; `None` at the end.
    ///
    /// # Errors
    /// When the file cannot be read on.
    #[inline]
    pub fn peek(&mut self) -> io::Result<Option<u8>> {
        Ok(self.reader.fill_buf()?.first().copied())
    }

    /// Passes over the byte that was peeked at.
    #[inline]
    pub fn advance(&mut self, byte: u8) {
        self.reader.consume(1);
        if byte == b'\n' {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += 1;
        }
    }

    /// Takes the next byte.
    ///
    /// # Errors
    /// As [`Input::peek`].
    #[inline]
    pub fn next_byte(&mut self) -> io::Result<Option<u8>> {
        let byte = self.peek()?;
        if let Some(byte) = byte {
            self.advance(byte);
        }
        Ok(byte)
    }

    /// Passes over white space; the byte behind it, which stays.
    ///
    /// # Errors
    /// As [`Input::peek`].
    pub fn skip_white_space(&mut self) -> io::Result<Option<u8>> {
        loop {
            match self.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => self.advance(byte),
                other => return Ok(other),
            }
        }
    }

    /// Appends the rest of the line to `part`, its line feed included, but no more than `most`
    /// bytes; how many it were, 0 at the end of the file.
    ///
    /// # Errors
    /// As [`Input::peek`].
    pub fn read_line(&mut self, most: usize, part: &mut Vec<u8>) -> io::Result<usize> {
        let mut rest = (&mut self.reader).take(most as u64);
        let read = rest.read_until(b'\n', part)?;
        if read > 0 && part.ends_with(b"\n") {
            self.line += 1;
            self.column = 1;
        } else {
            self.column += read;
        }
        Ok(read)
    }
}
