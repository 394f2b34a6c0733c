//! The pages of one column in one row group, fetched one at a time, and checked for what the crate
//! takes on trust.

use std::sync::Arc;

use parquet::basic::{Compression, Encoding};
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ColumnChunkMetaData;

use super::codec::{MAX_PAGE, decompress};
use super::header::{Header, Kind};
use super::levels::RowLengths;
use super::source::Source;

/// First and largest guess of the length of a page's header, which may hold long statistics.
const HEADER: u64 = 1 << 12;
const MAX_HEADER: u64 = 1 << 20;

pub(super) struct Pages {
    source: Arc<Source>,
    at: u64,
    end: u64,
    compression: Compression,
    max_def: i16,
    max_rep: i16,
    row_lengths: RowLengths,
    has_dictionary: bool,
}

impl Pages {
    /// The pages of a column chunk.
    pub fn of(
        source: &Arc<Source>,
        chunk: &ColumnChunkMetaData,
    ) -> std::result::Result<Self, String> {
        if chunk.file_path().is_some() {
            return Err("its columns are in other files".to_owned());
        }
        let starts = [
            Some(chunk.data_page_offset()),
            chunk.dictionary_page_offset(),
        ];
        // Some writers say 0 where there is no dictionary.
        let start = starts
            .into_iter()
            .flatten()
            .filter(|&start| start > 0)
            .min();
        let start = start.and_then(|start| u64::try_from(start).ok());
        let bytes = u64::try_from(chunk.compressed_size()).ok();
        let range = start.zip(bytes);
        let Some((at, end)) = range.and_then(|(start, bytes)| {
            let end = start.checked_add(bytes)?;
            (end <= source.length()).then_some((start, end))
        }) else {
            return Err("its columns lie beyond its end; is it complete?".to_owned());
        };
        let descriptor = chunk.column_descr();
        Ok(Self {
            source: Arc::clone(source),
            at,
            end,
            compression: chunk.compression(),
            max_def: descriptor.max_def_level(),
            max_rep: descriptor.max_rep_level(),
            row_lengths: RowLengths::default(),
            has_dictionary: false,
        })
    }

    fn next_page(&mut self) -> std::result::Result<Option<Page>, String> {
        while self.at < self.end {
            let (header, length) = self.header()?;
            let body = self.at + length as u64;
            if u64::from(header.compressed) > self.end - body {
                return Err("a page goes on beyond its column".to_owned());
            }
            if u64::from(header.uncompressed) > MAX_PAGE {
                let bytes = header.uncompressed;
                return Err(format!(
                    "a page has {bytes} bytes; at most {MAX_PAGE} are read: write it again with \
                     smaller pages"
                ));
            }
            self.at = body + u64::from(header.compressed);
            if header.kind == Kind::Index {
                continue;
            }
            let bytes = self.source.read(body, u64::from(header.compressed))?;
            return self.page(&header, bytes).map(Some);
        }
        Ok(None)
    }

    fn header(&self) -> std::result::Result<(Header, usize), String> {
        let left = self.end - self.at;
        let mut guess = HEADER;
        loop {
            let bytes = self.source.read(self.at, guess.min(left))?;
            match Header::parse(&bytes) {
                Ok(parsed) => return Ok(parsed),
                Err(Some(what)) => return Err(format!("the header of a page is damaged ({what})")),
                Err(None) if guess < left && guess < MAX_HEADER => guess *= 4,
                Err(None) => return Err("the header of a page is cut off or too long".to_owned()),
            }
        }
    }

    fn page(&mut self, header: &Header, bytes: Vec<u8>) -> std::result::Result<Page, String> {
        let size = header.uncompressed as usize;
        let encoding = header.encoding()?;
        let num_values = header.num_values;
        match header.kind {
            Kind::Dictionary => {
                let page = decompress(self.compression, bytes, size)?;
                // A value takes four bytes at least: the length of its text, or a number.
                if num_values as usize > page.len() / 4 {
                    return Err("a dictionary of more values than its bytes can hold".to_owned());
                }
                self.has_dictionary = true;
                Ok(Page::DictionaryPage {
                    buf: page.into(),
                    num_values,
                    encoding,
                    is_sorted: false,
                })
            }
            Kind::V1 => {
                let page = decompress(self.compression, bytes, size)?;
                let mut rest = page.as_slice();
                let mut levels = |max: i16| match max {
                    0 => Ok(&[][..]),
                    _ => split_levels(&mut rest),
                };
                let (rep, _def) = (levels(self.max_rep)?, levels(self.max_def)?);
                self.check(encoding, rep, num_values, rest)?;
                Ok(Page::DataPage {
                    buf: page.into(),
                    num_values,
                    encoding,
                    def_level_encoding: Encoding::RLE,
                    rep_level_encoding: Encoding::RLE,
                    statistics: None,
                })
            }
            Kind::V2 => {
                let (rep, def) = (header.rep_bytes as usize, header.def_bytes as usize);
                let levels = rep.saturating_add(def);
                if levels > size || levels > bytes.len() {
                    return Err("a page of less bytes than its levels".to_owned());
                }
                // Levels are never compressed.
                let mut page = bytes[..levels].to_vec();
                let (compression, values) = match header.is_compressed {
                    true => (self.compression, bytes[levels..].to_vec()),
                    false => (Compression::UNCOMPRESSED, bytes[levels..].to_vec()),
                };
                if !values.is_empty() || size > levels {
                    page.extend(decompress(compression, values, size - levels)?);
                }
                self.check(encoding, &page[..rep], num_values, &page[levels..])?;
                Ok(Page::DataPageV2 {
                    buf: page.into(),
                    num_values,
                    encoding,
                    num_nulls: header.num_nulls,
                    num_rows: header.num_rows,
                    def_levels_byte_len: header.def_bytes,
                    rep_levels_byte_len: header.rep_bytes,
                    is_compressed: false,
                    statistics: None,
                })
            }
            Kind::Index => Err("an index where values belong".to_owned()),
        }
    }

    /// Checks a page's values for what would be reserved or asked for unseen, and its rows for their
    /// length.
    fn check(
        &mut self,
        encoding: Encoding,
        rep: &[u8],
        num_values: u32,
        values: &[u8],
    ) -> std::result::Result<(), String> {
        match encoding {
            Encoding::RLE_DICTIONARY | Encoding::PLAIN_DICTIONARY if !self.has_dictionary => {
                return Err("a page refers to a dictionary that is not there".to_owned());
            }
            Encoding::DELTA_LENGTH_BYTE_ARRAY => {
                let total = super::header::delta_total(values);
                if total.is_none_or(|total| total > u64::from(num_values)) {
                    return Err("a page of more lengths than values".to_owned());
                }
            }
            _ => {}
        }
        match self.max_rep {
            0 => Ok(()),
            max => self.row_lengths.page(rep, max, num_values),
        }
    }
}

/// The levels at the start of a page of the first version, behind their length.
fn split_levels<'a>(rest: &mut &'a [u8]) -> std::result::Result<&'a [u8], String> {
    let parts = rest
        .split_first_chunk::<4>()
        .and_then(|(length, behind)| behind.split_at_checked(u32::from_le_bytes(*length) as usize));
    let (levels, behind) = parts.ok_or("a page of less bytes than its levels")?;
    *rest = behind;
    Ok(levels)
}

impl Iterator for Pages {
    type Item = Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for Pages {
    fn get_next_page(&mut self) -> Result<Option<Page>> {
        self.next_page().map_err(ParquetError::General)
    }

    fn peek_next_page(&mut self) -> Result<Option<PageMetadata>> {
        Err(ParquetError::NYI(
            "pages are read, not looked at".to_owned(),
        ))
    }

    fn skip_next_page(&mut self) -> Result<()> {
        Err(ParquetError::NYI(
            "pages are read, not passed over".to_owned(),
        ))
    }

    fn at_record_boundary(&mut self) -> Result<bool> {
        Ok(self.at >= self.end)
    }
}
