//! Writes a cache file beside its place and renames it when it is whole.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::lock::partial_path;
use super::mapped::{HEADER_BYTES, Header};
use crate::data::rows::{RowBlock, RowEntry};

/// A file that is removed when it goes out of scope, unless it was renamed by then.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A cache file in the making: rows go into one file, their index into another that is appended at
/// the end, so that neither is ever in memory.
pub(super) struct CacheWriter {
    place: PathBuf,
    rows: BufWriter<File>,
    rows_partial: Partial,
    index: BufWriter<File>,
    _index_partial: Partial,
    index_crc32: crc32fast::Hasher,
    header: Header,
}

/// Tells apart the files of two threads of this process.
static COUNT: AtomicU64 = AtomicU64::new(0);

impl CacheWriter {
    /// Begins the file that is to stand at `place` in `folder`.
    ///
    /// # Errors
    /// The folder cannot be written to.
    pub fn create(folder: &Path, name: &str, place: &Path) -> io::Result<Self> {
        let suffix = format!(
            "{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let create = |kind: &str| {
            let path = partial_path(folder, name, &format!("{suffix}.{kind}"));
            let mut options = File::options();
            let file = options
                .create_new(true)
                .read(true)
                .write(true)
                .open(&path)?;
            io::Result::Ok((BufWriter::with_capacity(1 << 20, file), Partial(path)))
        };
        let (mut rows, rows_partial) = create("rows")?;
        let (index, index_partial) = create("index")?;
        // A header of zeros belongs to no cache file.
        rows.write_all(&[0; HEADER_BYTES])?;
        Ok(Self {
            place: place.to_owned(),
            rows,
            rows_partial,
            index,
            _index_partial: index_partial,
            index_crc32: crc32fast::Hasher::new(),
            header: Header::default(),
        })
    }

    /// Adds rows.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn append(&mut self, block: &RowBlock) -> io::Result<()> {
        self.rows.write_all(bytemuck::cast_slice(block.words()))?;
        for entry in block.entries() {
            let start = self.header.words + entry.start;
            let words = RowEntry { start, ..entry }.to_words();
            let bytes = bytemuck::bytes_of(&words);
            self.index_crc32.update(bytes);
            self.index.write_all(bytes)?;
            self.header.rows += 1;
            self.header.tokens += u64::from(entry.tokens);
            self.header.targets += u64::from(entry.targets);
        }
        self.header.words += block.words().len() as u64;
        Ok(())
    }

    /// Completes the file, the index and `tail` behind the rows, and puts it in its place. Before
    /// the rename everything is on the disk.
    ///
    /// # Errors
    /// It cannot be written; nothing is left of it then.
    pub fn finish(mut self, tail: &[u8]) -> io::Result<()> {
        self.index.rewind()?;
        io::copy(self.index.get_mut(), &mut self.rows)?;
        self.rows.write_all(tail)?;
        self.header.index_crc32 = self.index_crc32.clone().finalize();
        self.header.tail_bytes = tail.len() as u64;
        self.header.tail_crc32 = crc32fast::hash(tail);
        self.rows.rewind()?;
        self.rows.write_all(&self.header.to_bytes())?;
        self.rows.flush()?;
        self.rows.get_ref().sync_all()?;
        fs::rename(&self.rows_partial.0, &self.place)?;
        if let Some(folder) = self
            .place
            .parent()
            .filter(|path| !path.as_os_str().is_empty())
        {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }
}
