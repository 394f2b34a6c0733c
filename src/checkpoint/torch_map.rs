//! Tensors of a PyTorch zip file where they lie in it: `torch.save` stores them as they are.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::Path;

use memmap2::Mmap;
use zip::{CompressionMethod, ZipArchive};

use super::torch_pickle::{self, Place};
use super::{CheckpointError, Dtype, OpenTensor};

/// The most bytes of a pickle: a hundred times that of ChatGLM-6B in one file.
const MAX_PICKLE_BYTES: u64 = 16 << 20;

/// A file mapped into memory, and what of its tensors stands in one piece there.
#[derive(Debug)]
pub(super) struct TorchMap {
    file: File,
    map: Mmap,
    tensors: BTreeMap<String, Mapped>,
}

#[derive(Clone, Debug)]
struct Mapped {
    range: Range<usize>,
    /// Of the bytes, where they are all of an entry that has one.
    crc32: Option<u32>,
}

/// What the reader says about a tensor.
pub(super) struct Said<'a> {
    pub name: &'a str,
    pub dtype: Dtype,
    pub shape: &'a [usize],
}

impl TorchMap {
    /// Maps a file; nothing where it is no zip file, or none of `tensors` stands there as it is said.
    pub fn open<'a>(path: &Path, tensors: impl Iterator<Item = Said<'a>>) -> Option<Self> {
        let file = File::open(path).ok()?;
        // SAFETY: as in `SafetensorsFile::open`: private, read-only, seen as bytes only, never changed
        // in place by this program, and `bytes` looks at the size before each use.
        let map = unsafe { Mmap::map(&file) }.ok()?;
        let mut archive = ZipArchive::new(BufReader::new(file.try_clone().ok()?)).ok()?;
        let root = root(&archive)?;
        let mut pickle = Vec::new();
        let entry = archive.by_name(&format!("{root}data.pkl")).ok()?;
        entry.take(MAX_PICKLE_BYTES).read_to_end(&mut pickle).ok()?;
        let places = torch_pickle::places(&pickle)?;
        let mut storages: BTreeMap<&str, Option<Mapped>> = BTreeMap::new();
        let mut mapped = BTreeMap::new();
        for said in tensors {
            let Some(place) = places.get(said.name) else {
                continue;
            };
            let storage = storages
                .entry(&place.storage)
                .or_insert_with(|| storage(&mut archive, &root, &place.storage, map.len()));
            if let Some(tensor) = storage
                .as_ref()
                .and_then(|storage| within(storage, place, &said))
            {
                mapped.insert(said.name.to_owned(), tensor);
            }
        }
        (!mapped.is_empty()).then_some(TorchMap {
            file,
            map,
            tensors: mapped,
        })
    }

    /// Opens a tensor, if it stands in one piece.
    ///
    /// # Errors
    /// The file was shortened since it was opened, or its bytes are not those that were written.
    pub fn tensor(
        &self,
        path: &Path,
        said: &Said<'_>,
    ) -> Option<Result<OpenTensor<'_>, CheckpointError>> {
        let tensor = self.tensors.get(said.name)?;
        Some(self.checked(path, said, tensor))
    }

    fn checked(
        &self,
        path: &Path,
        said: &Said<'_>,
        tensor: &Mapped,
    ) -> Result<OpenTensor<'_>, CheckpointError> {
        let now = self.file.metadata().map_err(CheckpointError::read(path))?;
        if now.len() < self.map.len() as u64 {
            let reason = "it was shortened while it was being read";
            return Err(CheckpointError::damaged(path, reason));
        }
        let (shape, range) = (said.shape.to_vec(), tensor.range.clone());
        let opened = OpenTensor::mapped(said.dtype, shape, &self.map, range.clone())?;
        match tensor.crc32 {
            Some(crc32) if crc32fast::hash(&self.map[range]) != crc32 => {
                let reason = format!("the bytes of tensor '{}' have another checksum", said.name);
                Err(CheckpointError::damaged(path, reason))
            }
            _ => Ok(opened),
        }
    }
}

/// The folder in the archive that holds `data.pkl`: the outermost, as for the reader.
fn root(archive: &ZipArchive<BufReader<File>>) -> Option<String> {
    let names = archive.file_names().filter_map(Result::ok);
    let roots = names.filter_map(|name| Some(name.strip_suffix("data.pkl")?.to_owned()));
    roots
        .filter(|root| root.is_empty() || root.ends_with('/'))
        .min_by_key(String::len)
}

/// The bytes of a storage that is stored as it is.
fn storage(
    archive: &mut ZipArchive<BufReader<File>>,
    root: &str,
    name: &str,
    file_len: usize,
) -> Option<Mapped> {
    let index = archive.index_for_name(&format!("{root}data/{name}"))?;
    let entry = archive.by_index_raw(index).ok()?;
    let as_it_is = entry.compression() == CompressionMethod::Stored
        && entry.compressed_size() == entry.size()
        && !entry.encrypted();
    let start = usize::try_from(entry.data_start()?).ok()?;
    let end = start.checked_add(usize::try_from(entry.size()).ok()?)?;
    // `torch.save` writes 0 where it is told to compute none.
    let crc32 = Some(entry.crc32()).filter(|&crc32| crc32 != 0);
    (as_it_is && end <= file_len).then_some(Mapped {
        range: start..end,
        crc32,
    })
}

/// A tensor's bytes within its storage, if pickle and reader agree about it and it is in one piece.
fn within(storage: &Mapped, place: &Place, said: &Said<'_>) -> Option<Mapped> {
    let agreed = place.dtype == said.dtype && place.shape == said.shape && place.is_contiguous();
    let start = place.offset.checked_mul(place.dtype.size())?;
    let start = storage.range.start.checked_add(start)?;
    let end = start.checked_add(place.dtype.bytes_of(&place.shape)?)?;
    let range = start..end;
    (agreed && end <= storage.range.end).then(|| Mapped {
        crc32: storage.crc32.filter(|_| range == storage.range),
        range: range.clone(),
    })
}
