//! The safetensors format: a memory-mapped reader and an atomic writer of one file.
//!
//! The file is eight bytes of header length, a JSON header, then the tensors without gaps
//! (<https://github.com/huggingface/safetensors>).

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype as FileDtype;
use ::safetensors::tensor::{Metadata, TensorInfo as FileEntry};
use memmap2::Mmap;

use super::input_file::open_plain;
use super::{CheckpointError, Dtype, HostTensor, OpenTensor, TensorInfo, TensorSource, durable};

const LENGTH_BYTES: usize = 8;

/// The most bytes of a header: 500 times that of ChatGLM-6B.
const MAX_HEADER_BYTES: usize = 32 << 20;

/// One safetensors file, mapped into memory; the tensors are not touched before they are read.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header against its size.
    ///
    /// # Errors
    /// The file cannot be read, is a Git LFS pointer, is cut short, has a header that contradicts
    /// itself or the file, or has a tensor of an unsupported element type.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, size) = open_plain(path)?;
        if size < LENGTH_BYTES as u64 {
            let reason = format!("{size} bytes are too few for a safetensors file");
            return Err(CheckpointError::damaged(path, reason));
        }
        // SAFETY: the map is private to this value, read-only and only seen as bytes, for which every
        // value is valid. This program never writes into a file in place (it renames new ones over
        // old ones), so only another program can change the file below the map. Changed bytes are
        // then wrong numbers, not wrong memory; a shortened file would end in SIGBUS, which `bytes`
        // heads off by looking at the size before each use.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::read(path))?;
        let entries = parse(&map).map_err(|reason| CheckpointError::damaged(path, reason))?;
        let entries = entries
            .into_iter()
            .map(|(name, (entry, range))| {
                let dtype =
                    allowed(entry.dtype).ok_or_else(|| CheckpointError::UnsupportedDtype {
                        path: path.to_owned(),
                        tensor: name.clone(),
                        found: entry.dtype.to_string(),
                    })?;
                let shape = entry.shape;
                Ok((
                    name,
                    Entry {
                        dtype,
                        shape,
                        range,
                    },
                ))
            })
            .collect::<Result<_, CheckpointError>>()?;
        Ok(Self {
            path: path.to_owned(),
            file,
            map,
            entries,
        })
    }

    /// The bytes of a tensor where they lie in the file.
    ///
    /// # Errors
    /// There is no such tensor, or the file was shortened since it was opened.
    pub fn bytes(&self, name: &str) -> Result<&[u8], CheckpointError> {
        let entry = self.entry(name)?;
        self.check_length()?;
        Ok(&self.map[entry.range.clone()])
    }

    /// Looks whether the file is as long as the map of it.
    fn check_length(&self) -> Result<(), CheckpointError> {
        let now = self
            .file
            .metadata()
            .map_err(CheckpointError::read(&self.path))?;
        if now.len() < self.map.len() as u64 {
            let reason = "it was shortened while it was being read";
            return Err(CheckpointError::damaged(&self.path, reason));
        }
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry, CheckpointError> {
        self.entries
            .get(name)
            .ok_or_else(|| CheckpointError::NoSuchTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })
    }
}

impl TensorSource for SafetensorsFile {
    fn names(&self) -> Vec<String> {
        self.entries.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.entries.get(name).map(|entry| TensorInfo {
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            file: self.path.clone(),
        })
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        let entry = self.entry(name)?;
        HostTensor::new(entry.dtype, entry.shape.clone(), self.bytes(name)?.to_vec())
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        let entry = self.entry(name)?;
        self.check_length()?;
        let (shape, range) = (entry.shape.clone(), entry.range.clone());
        OpenTensor::mapped(entry.dtype, shape, &self.map, range)
    }
}

/// The entries of a whole file with their places in it, or what is wrong with it.
///
/// The header is cut out here and only then given to the crate's own checks (no gaps, no overlaps,
/// sizes as shapes say), because the crate adds up sizes of the whole file unchecked.
fn parse(file: &[u8]) -> Result<BTreeMap<String, (FileEntry, Range<usize>)>, String> {
    let (length, rest) = file
        .split_first_chunk::<LENGTH_BYTES>()
        .ok_or("it has no header")?;
    let length = u64::from_le_bytes(*length);
    let header = usize::try_from(length)
        .ok()
        .and_then(|length| rest.get(..length))
        .ok_or_else(|| {
            format!(
                "its header claims {length} bytes, the file has {}",
                file.len()
            )
        })?;
    if header.len() > MAX_HEADER_BYTES {
        return Err(format!("its header of {length} bytes is too large"));
    }
    let header_json: Metadata = serde_json::from_slice(header)
        .map_err(|cause| format!("its header is not valid ({cause})"))?;
    let data = &rest[header.len()..];
    if header_json.data_len() != data.len() {
        return Err(format!(
            "its header describes {} bytes of tensors, the file has {}",
            header_json.data_len(),
            data.len()
        ));
    }
    let data_start = file.len() - data.len();
    let place = |(name, entry): (String, &FileEntry)| {
        let (start, end) = entry.data_offsets;
        (name, (entry.clone(), data_start + start..data_start + end))
    };
    Ok(header_json.tensors().into_iter().map(place).collect())
}

/// Writes tensors as one safetensors file with the metadata `{"format": "pt"}`, atomically.
///
/// The order in the file is that of the reference implementation: widest element type first, then by
/// name, so equal tensors give equal files.
///
/// # Errors
/// A tensor's shape and bytes disagree, a name comes twice or is reserved, or the file cannot be
/// written.
pub fn write_safetensors<'a, S: AsRef<str>>(
    path: &Path,
    tensors: impl IntoIterator<Item = (S, &'a HostTensor)>,
) -> Result<(), CheckpointError> {
    let mut sorted: Vec<(String, FileDtype, &HostTensor)> = Vec::new();
    for (name, tensor) in tensors {
        let name = name.as_ref().to_owned();
        tensor
            .check()
            .map_err(|cause| cause.in_tensor(path, &name))?;
        sorted.push((name, file_dtype(tensor.dtype), tensor));
    }
    sorted.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));

    let mut end = 0_usize;
    let mut entries = BTreeMap::new();
    for (name, dtype, tensor) in &sorted {
        let start = end;
        end += tensor.bytes.len();
        let entry = FileEntry {
            dtype: *dtype,
            shape: tensor.shape.clone(),
            data_offsets: (start, end),
        };
        if name == "__metadata__" || entries.insert(name.as_str(), entry).is_some() {
            let reason = format!("the tensor name '{name}' is reserved or comes twice");
            return Err(CheckpointError::mismatch(path, reason));
        }
    }
    let header =
        header(&sorted, entries).map_err(|reason| CheckpointError::mismatch(path, reason))?;
    durable::write_file(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        sorted
            .iter()
            .try_for_each(|(_, _, tensor)| out.write_all(&tensor.bytes))
    })
}

/// The JSON header, padded with spaces so that the tensors start at a multiple of eight.
fn header(
    sorted: &[(String, FileDtype, &HostTensor)],
    mut entries: BTreeMap<&str, FileEntry>,
) -> Result<Vec<u8>, String> {
    let in_file_order = sorted
        .iter()
        .filter_map(|(name, _, _)| Some((name.clone(), entries.remove(name.as_str())?)))
        .collect();
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), in_file_order).map_err(|cause| cause.to_string())?;
    let mut header = serde_json::to_vec(&metadata).map_err(|cause| cause.to_string())?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    if header.len() > MAX_HEADER_BYTES {
        return Err(format!(
            "{} tensors are too many for one file",
            sorted.len()
        ));
    }
    Ok(header)
}

fn allowed(dtype: FileDtype) -> Option<Dtype> {
    Some(match dtype {
        FileDtype::F16 => Dtype::F16,
        FileDtype::BF16 => Dtype::Bf16,
        FileDtype::F32 => Dtype::F32,
        FileDtype::F64 => Dtype::F64,
        FileDtype::I8 => Dtype::I8,
        FileDtype::U8 => Dtype::U8,
        FileDtype::I16 => Dtype::I16,
        FileDtype::I32 => Dtype::I32,
        FileDtype::I64 => Dtype::I64,
        FileDtype::BOOL => Dtype::Bool,
        _ => return None,
    })
}

fn file_dtype(dtype: Dtype) -> FileDtype {
    match dtype {
        Dtype::F16 => FileDtype::F16,
        Dtype::Bf16 => FileDtype::BF16,
        Dtype::F32 => FileDtype::F32,
        Dtype::F64 => FileDtype::F64,
        Dtype::I8 => FileDtype::I8,
        Dtype::U8 => FileDtype::U8,
        Dtype::I16 => FileDtype::I16,
        Dtype::I32 => FileDtype::I32,
        Dtype::I64 => FileDtype::I64,
        Dtype::Bool => FileDtype::BOOL,
    }
}
