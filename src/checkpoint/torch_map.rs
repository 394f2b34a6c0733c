//! The container of a PyTorch file: which tensors it names, and where they lie in it.
//!
//! Two kinds are read: the zip archive of PyTorch 1.6 and later, whose entries `torch.save` stores as
//! they are, and the older stream of pickles. What neither of them needs (compressed and encrypted
//! entries, the tar archives of before 0.1.10, bare pickles) is refused before any other reader sees
//! the file.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use zip::{CompressionMethod, ZipArchive};

use super::torch_pickle::{self, MAX_PICKLE_BYTES, Place};
use super::{Dtype, zip_end};

/// What a zip archive starts with; the second is one without entries.
const ZIP_LEADS: [&[u8]; 2] = [b"PK\x03\x04", b"PK\x05\x06"];

/// The number that a stream of pickles starts with, and how far it may be from the start.
const STREAM_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
const STREAM_MAGIC_REACH: usize = 32;

/// The most entries of an archive: one for each tensor and a few more, forty times those of ChatGLM-6B.
const MAX_ENTRIES: usize = 20_000;

/// The most bytes that are read to list the entries, and then for what stands in front of each.
const MAX_LISTING_BYTES: u64 = 8 << 20;
const MAX_HEADER_BYTES: u64 = 4 << 10;

/// Bytes read at a time; entries are small and far from each other.
const READ_AHEAD: usize = 1 << 10;

/// What a PyTorch file holds, by its own word.
#[derive(Debug)]
pub(super) struct TorchMap {
    /// The tensors, by name.
    pub places: BTreeMap<String, Place>,
    /// Where those stand that are in one piece; none of a stream.
    pub mapped: BTreeMap<String, Mapped>,
}

/// Bytes of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    /// Where they begin.
    pub start: u64,
    /// How many there are.
    pub len: usize,
    /// Of the bytes, where they are all of an entry that has one.
    pub crc32: Option<u32>,
}

type Archive<'a> = ZipArchive<BufReader<Bounded<'a>>>;

impl TorchMap {
    /// Reads the list of tensors of a file of `size` bytes.
    ///
    /// # Errors
    /// What is wrong with it, or what it holds beside tensors.
    pub fn read(file: &File, size: u64) -> Result<Self, String> {
        let mut lead = Vec::new();
        let mut start = file;
        start
            .rewind()
            .and_then(|()| start.take(512).read_to_end(&mut lead))
            .map_err(|cause| cause.to_string())?;
        if ZIP_LEADS.iter().any(|magic| lead.starts_with(magic)) {
            return Self::of_archive(file, size);
        }
        let magic_at = lead
            .windows(STREAM_MAGIC.len())
            .position(|window| window == STREAM_MAGIC);
        if magic_at.is_some_and(|at| at < STREAM_MAGIC_REACH) {
            return Self::of_stream(file);
        }
        Err(match lead.get(257..262) {
            Some(b"ustar") => "it is a tar archive, as PyTorch before 0.1.10 wrote them".to_owned(),
            _ => "it is not a PyTorch checkpoint, neither a zip archive nor the older stream of \
                  torch.save"
                .to_owned(),
        })
    }

    fn of_archive(file: &File, size: u64) -> Result<Self, String> {
        zip_end::check(file, size, MAX_ENTRIES as u64)?;
        let left = Cell::new(MAX_LISTING_BYTES);
        let reader = BufReader::with_capacity(READ_AHEAD, Bounded { file, left: &left });
        let mut archive: Archive<'_> =
            ZipArchive::new(reader).map_err(|cause| format!("its list of entries: {cause}"))?;
        if archive.len() > MAX_ENTRIES {
            return Err(format!("it is an archive of {} entries", archive.len()));
        }
        left.set(archive.len() as u64 * MAX_HEADER_BYTES);
        let root = root(&archive).ok_or("it is a zip archive without a data.pkl")?;
        let entries = plain_entries(&mut archive, size)?;
        let pickle_at = entries
            .get(&format!("{root}data.pkl"))
            .ok_or("it is a zip archive without a data.pkl")?;
        if pickle_at.len as u64 > MAX_PICKLE_BYTES {
            return Err(format!("its pickle has {} bytes", pickle_at.len));
        }
        let mut pickle = Vec::new();
        let mut start = file;
        start
            .seek(SeekFrom::Start(pickle_at.start))
            .and_then(|_| start.take(pickle_at.len as u64).read_to_end(&mut pickle))
            .map_err(|cause| cause.to_string())?;
        let (places, _) = torch_pickle::tensors(&pickle)?;
        let mut mapped = BTreeMap::new();
        for (name, place) in &places {
            let storage = entries
                .get(&format!("{root}data/{}", place.storage))
                .ok_or_else(|| {
                    format!(
                        "the values of tensor '{name}', data/{}, are missing",
                        place.storage
                    )
                })?;
            if let Some(tensor) = within(storage, place) {
                mapped.insert(name.clone(), tensor);
            }
        }
        Ok(Self { places, mapped })
    }

    /// A magic number, a version, a few facts of the system, the dictionary, the storages' names, each by
    /// a pickle of its own; then the storages.
    fn of_stream(file: &File) -> Result<Self, String> {
        let mut lead = Vec::new();
        let mut start = file;
        start
            .rewind()
            .and_then(|()| start.take(MAX_PICKLE_BYTES).read_to_end(&mut lead))
            .map_err(|cause| cause.to_string())?;
        let mut pickles: &[u8] = &lead;
        for _ in 0..3 {
            pickles = torch_pickle::behind(pickles)?;
        }
        let (places, names) = torch_pickle::tensors(pickles)?;
        torch_pickle::behind(names)?;
        Ok(Self {
            places,
            mapped: BTreeMap::new(),
        })
    }
}

/// A file of which no more than so many bytes are read.
struct Bounded<'a> {
    file: &'a File,
    left: &'a Cell<u64>,
}

impl Read for Bounded<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let wanted = out.len() as u64;
        let left = self.left.get();
        if wanted > 0 && left == 0 {
            return Err(io::Error::other("it is too long"));
        }
        let read = self.file.read(&mut out[..wanted.min(left) as usize])?;
        self.left.set(left - read as u64);
        Ok(read)
    }
}

impl Seek for Bounded<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// The folder in the archive that holds `data.pkl`: the outermost, as for the reader.
fn root(archive: &Archive<'_>) -> Option<String> {
    let names = archive.file_names().filter_map(Result::ok);
    let roots = names.filter_map(|name| Some(name.strip_suffix("data.pkl")?.to_owned()));
    roots
        .filter(|root| root.is_empty() || root.ends_with('/'))
        .min_by_key(String::len)
}

/// Where the entries lie, all of them stored as they are.
fn plain_entries(archive: &mut Archive<'_>, size: u64) -> Result<BTreeMap<String, Mapped>, String> {
    let mut entries = BTreeMap::new();
    for index in 0..archive.len() {
        let entry = archive
            .by_index_raw(index)
            .map_err(|cause| format!("its entry {index}: {cause}"))?;
        let name = entry
            .name()
            .map_err(|cause| format!("its entry {index}: {cause}"))?
            .into_owned();
        if entry.encrypted() {
            return Err(format!("its entry '{name}' is encrypted"));
        }
        if entry.compression() != CompressionMethod::Stored {
            return Err(format!(
                "its entry '{name}' is compressed, which torch.save never does"
            ));
        }
        let start = entry.data_start().unwrap_or(u64::MAX);
        let end = start.checked_add(entry.size());
        if entry.compressed_size() != entry.size() || end.is_none_or(|end| end > size) {
            return Err(format!(
                "its entry '{name}' of {} bytes does not lie within the file",
                entry.size()
            ));
        }
        // `torch.save` writes 0 where it is told to compute none.
        let crc32 = Some(entry.crc32()).filter(|&crc32| crc32 != 0);
        let mapped = Mapped {
            start,
            len: usize::try_from(entry.size()).map_err(|cause| cause.to_string())?,
            crc32,
        };
        if entries.insert(name.clone(), mapped).is_some() {
            return Err(format!("its entry '{name}' comes twice"));
        }
    }
    Ok(entries)
}

/// A tensor's bytes within its storage, if it is in one piece. Python's True is any byte but 0, so that
/// truth values are left to the reader.
fn within(storage: &Mapped, place: &Place) -> Option<Mapped> {
    let skipped = place.offset.checked_mul(place.dtype.size())?;
    let len = place.dtype.bytes_of(&place.shape)?;
    let fits = skipped.checked_add(len)? <= storage.len;
    let as_it_is = place.is_contiguous() && place.dtype != Dtype::Bool;
    (as_it_is && fits).then(|| Mapped {
        start: storage.start + skipped as u64,
        len,
        crc32: storage.crc32.filter(|_| len == storage.len),
    })
}
