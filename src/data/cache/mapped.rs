//! Opens a cache file, and believes nothing of it that it did not check.
//!
//! The file is a header of 16 words of 64 bits, the words of all rows one after another, the index
//! with an entry of 32 bytes per row, and a tail of JSON: the manifest and the report.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use serde::{Deserialize, Serialize};

use crate::data::rows::{EntryWords, RowEntry};
use crate::data::text_rows::RowReport;

const MAGIC: u64 = u64::from_le_bytes(*b"MPTrows1");
/// Size of the header, in bytes.
pub(super) const HEADER_BYTES: usize = 128;
const ENTRY_BYTES: u64 = size_of::<EntryWords>() as u64;
/// Largest tail that is read: some hundred thousand files.
const MAX_TAIL_BYTES: u64 = 256 << 20;
/// So many bytes of rows are compared with their checksums when a file is opened; of more, runs of
/// rows evenly spread that amount to about this.
const VERIFIED_BYTES: u64 = 256 << 20;
const VERIFIED_RUN: usize = 4096;

/// Why a file cannot be used as this cache.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unusable {
    #[error("there is none")]
    Missing,
    #[error("it cannot be read: {0}")]
    Io(io::Error),
    #[error("it is no cache file of this version")]
    Foreign,
    #[error("its size is {found} bytes, not {expected}: it is incomplete")]
    Size { found: u64, expected: u64 },
    #[error("its {0} is damaged")]
    Damaged(&'static str),
    #[error("it was made of other data or settings")]
    Other,
}

impl From<io::Error> for Unusable {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            io::ErrorKind::UnexpectedEof => Self::Foreign,
            _ => Self::Io(error),
        }
    }
}

/// The sizes of a cache file's parts and their checksums.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Words of all rows.
    pub words: u64,
    /// Number of rows.
    pub rows: u64,
    /// Tokens of all rows.
    pub tokens: u64,
    /// Targets of all rows.
    pub targets: u64,
    /// Checksum of the index.
    pub index_crc32: u32,
    /// Size of the tail.
    pub tail_bytes: u64,
    /// Checksum of the tail.
    pub tail_crc32: u32,
}

impl Header {
    /// The form in the file. The numbers are those of the machine: a cache is made where it is used,
    /// and on a machine of the other byte order the first one does not fit.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut fields = [0_u64; HEADER_BYTES / 8];
        fields[..8].copy_from_slice(&[
            MAGIC,
            self.words,
            self.rows,
            self.tokens,
            self.targets,
            u64::from(self.index_crc32),
            self.tail_bytes,
            u64::from(self.tail_crc32),
        ]);
        fields[15] = u64::from(crc32fast::hash(bytemuck::cast_slice(&fields[..15])));
        bytemuck::cast(fields)
    }

    fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, Unusable> {
        let fields: [u64; HEADER_BYTES / 8] = bytemuck::cast(bytes);
        let header = Self {
            words: fields[1],
            rows: fields[2],
            tokens: fields[3],
            targets: fields[4],
            index_crc32: fields[5] as u32,
            tail_bytes: fields[6],
            tail_crc32: fields[7] as u32,
        };
        match (fields[0] == MAGIC, header.to_bytes() == bytes) {
            (false, _) => Err(Unusable::Foreign),
            (_, false) => Err(Unusable::Damaged("header")),
            _ => Ok(header),
        }
    }

    /// Where rows, index and tail lie, if that is a size a file can have.
    fn parts(&self) -> Option<[Range<u64>; 3]> {
        let rows_end = self
            .words
            .checked_mul(4)?
            .checked_add(HEADER_BYTES as u64)?;
        let index_end = self.rows.checked_mul(ENTRY_BYTES)?.checked_add(rows_end)?;
        let end = index_end.checked_add(self.tail_bytes)?;
        Some([
            HEADER_BYTES as u64..rows_end,
            rows_end..index_end,
            index_end..end,
        ])
    }
}

/// What stands behind the index.
#[derive(Deserialize)]
struct Tail {
    manifest: String,
    report: RowReport,
}

/// The tail of a file with this manifest and report.
pub(super) fn tail(manifest: &str, report: &RowReport) -> Vec<u8> {
    #[derive(Serialize)]
    struct Tail<'a> {
        manifest: &'a str,
        report: &'a RowReport,
    }
    // Plain structs of text and numbers always have a JSON form.
    serde_json::to_vec(&Tail { manifest, report }).unwrap_or_default()
}

/// The rows of a cache file, mapped into memory; a row is not touched before it is asked for.
#[derive(Debug)]
pub(in crate::data) struct MappedRows {
    map: Mmap,
    rows: Range<usize>,
    index: Range<usize>,
    tokens: usize,
    targets: usize,
}

impl MappedRows {
    /// Opens the cache file that holds this manifest, with the report it keeps.
    pub(super) fn open(path: &Path, manifest: &str) -> Result<(Self, RowReport), Unusable> {
        let mut file = File::open(path)?;
        let mut bytes = [0; HEADER_BYTES];
        file.read_exact(&mut bytes)?;
        let header = Header::parse(bytes)?;
        let found = file.metadata()?.len();
        let parts = header.parts().ok_or(Unusable::Damaged("header"))?;
        let [rows, index, tail] = parts;
        if tail.end != found {
            let expected = tail.end;
            return Err(Unusable::Size { found, expected });
        }
        if header.tail_bytes > MAX_TAIL_BYTES {
            return Err(Unusable::Damaged("header"));
        }
        // SAFETY: the map is private to this value, read-only and only seen as numbers, for which
        // every value is valid. This program never writes into a cache file in place: it writes a
        // new one and renames it over the old one, whose map stays what it was. So only another
        // program can change the file below the map. Changed bytes are then wrong numbers, not wrong
        // memory; a shortened file ends the process with SIGBUS, which for a file of our own making
        // in a folder of our own is as much as can be asked.
        let map = unsafe { Mmap::map(&file) }?;
        let range = |part: Range<u64>| part.start as usize..part.end as usize;
        let tail = map.get(range(tail)).unwrap_or_default();
        if crc32fast::hash(tail) != header.tail_crc32 {
            return Err(Unusable::Damaged("tail"));
        }
        let tail: Tail = serde_json::from_slice(tail).map_err(|_| Unusable::Damaged("tail"))?;
        if tail.manifest != manifest {
            return Err(Unusable::Other);
        }
        let mapped = Self {
            map,
            rows: range(rows),
            index: range(index),
            tokens: header.tokens as usize,
            targets: header.targets as usize,
        };
        mapped.check_index(&header)?;
        mapped.check_rows(file)?;
        Ok((mapped, tail.report))
    }

    /// The words of all rows.
    pub fn words(&self) -> &[u32] {
        self.numbers(&self.rows)
    }

    /// The entries of all rows.
    pub fn index(&self) -> &[EntryWords] {
        self.numbers(&self.index)
    }

    /// Tokens and targets of all rows.
    pub(super) fn totals(&self) -> (usize, usize) {
        (self.tokens, self.targets)
    }

    /// The ranges were checked, and begin at multiples of four of a page.
    fn numbers<T: bytemuck::AnyBitPattern>(&self, part: &Range<usize>) -> &[T] {
        let bytes = self.map.get(part.clone()).unwrap_or_default();
        bytemuck::try_cast_slice(bytes).unwrap_or_default()
    }

    /// Every entry stands for the words behind those of the one before it.
    fn check_index(&self, header: &Header) -> Result<(), Unusable> {
        let index = self.index();
        let damaged = Unusable::Damaged("index");
        if crc32fast::hash(bytemuck::cast_slice(index)) != header.index_crc32 {
            return Err(damaged);
        }
        let (mut words, mut tokens, mut targets) = (0, 0, 0);
        for entry in index.iter().copied().map(RowEntry::from_words) {
            if entry.start != words || entry.tokens == 0 || entry.context_length > entry.tokens {
                return Err(damaged);
            }
            words += entry.words() as u64;
            tokens += u64::from(entry.tokens);
            targets += u64::from(entry.targets);
        }
        let sums = (header.words, header.tokens, header.targets);
        match (words, tokens, targets) == sums && header.rows > 0 {
            true => Ok(()),
            false => Err(damaged),
        }
    }

    /// Compares rows with their checksums. They are read, not mapped, so that what is only looked at
    /// once stays out of this process's memory.
    fn check_rows(&self, file: File) -> Result<(), Unusable> {
        let every = (self.rows.len() as u64).div_ceil(VERIFIED_BYTES).max(1) as usize;
        let mut file = BufReader::with_capacity(1 << 20, file);
        file.seek(io::SeekFrom::Start(self.rows.start as u64))?;
        let mut at = 0;
        let mut words: Vec<u32> = Vec::new();
        let runs = self.index().chunks(VERIFIED_RUN).step_by(every);
        for entry in runs.flatten() {
            let entry = RowEntry::from_words(*entry);
            file.seek_relative(4 * (entry.start as i64 - at))?;
            // What the index says was compared with the size of the file.
            words.resize(entry.words(), 0);
            file.read_exact(bytemuck::cast_slice_mut(&mut words))?;
            at = entry.start as i64 + words.len() as i64;
            if entry.crc32_of(&words) != entry.crc32 {
                return Err(Unusable::Damaged("row data"));
            }
        }
        Ok(())
    }
}
