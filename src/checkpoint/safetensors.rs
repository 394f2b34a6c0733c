//! The safetensors format: a memory-mapped reader and an atomic writer of one file.
//!
//! The file is eight bytes of header length, a JSON header, then the tensors without gaps
//! (<https://github.com/huggingface/safetensors>).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
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
    let mut bytes = HashMap::new();
    let mut planned = Vec::new();
    for (name, tensor) in tensors {
        let name = name.as_ref().to_owned();
        tensor
            .check()
            .map_err(|cause| cause.in_tensor(path, &name))?;
        planned.push(PlannedTensor {
            name: name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        });
        bytes.insert(name, &tensor.bytes);
    }
    stream_safetensors(path, planned, |tensor, sink| {
        sink.write(bytes[&tensor.name])
    })
}

/// A tensor whose elements are yet to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedTensor {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each dimension.
    pub shape: Vec<usize>,
}

/// Where the elements of one tensor of a file go.
pub struct TensorSink<'a> {
    path: &'a Path,
    out: &'a mut dyn Write,
    /// Bytes that the tensor still lacks.
    lacks: usize,
}

impl TensorSink<'_> {
    /// Takes the next elements, little-endian.
    ///
    /// # Errors
    /// They are more than the tensor has, or the file cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        let Some(lacks) = self.lacks.checked_sub(bytes.len()) else {
            let reason = "a tensor got more elements than its shape has";
            return Err(CheckpointError::mismatch(self.path, reason));
        };
        self.lacks = lacks;
        self.out
            .write_all(bytes)
            .map_err(CheckpointError::write(self.path))
    }
}

/// As [`write_safetensors`], with tensors that are made while they are written: `fill` is called for
/// each, in the order of the file, and puts all its elements into the sink.
///
/// # Errors
/// As there, and those of `fill`; then there is no file.
pub fn stream_safetensors<E: From<CheckpointError>>(
    path: &Path,
    mut tensors: Vec<PlannedTensor>,
    mut fill: impl FnMut(&PlannedTensor, &mut TensorSink<'_>) -> Result<(), E>,
) -> Result<(), E> {
    tensors.sort_by(|a, b| {
        let (wide_a, wide_b) = (file_dtype(a.dtype), file_dtype(b.dtype));
        wide_b.cmp(&wide_a).then_with(|| a.name.cmp(&b.name))
    });
    let header = header(&tensors).map_err(|reason| CheckpointError::mismatch(path, reason))?;
    let mut failed = None;
    let written = durable::write_file(path, |out| {
        out.write_all(&(header.len() as u64).to_le_bytes())?;
        out.write_all(&header)?;
        for tensor in &tensors {
            let mut sink = TensorSink {
                path,
                lacks: tensor.dtype.bytes_of(&tensor.shape).unwrap_or(usize::MAX),
                out,
            };
            let filled = fill(tensor, &mut sink);
            let filled = filled.and_then(|()| match sink.lacks {
                0 => Ok(()),
                lacks => {
                    let reason = format!("tensor '{}' lacks {lacks} bytes", tensor.name);
                    Err(CheckpointError::mismatch(path, reason).into())
                }
            });
            if let Err(error) = filled {
                failed = Some(error);
                return Err(std::io::ErrorKind::Other.into());
            }
        }
        Ok(())
    });
    match failed {
        Some(error) => Err(error),
        None => Ok(written?),
    }
}

/// The JSON header, padded with spaces so that the tensors start at a multiple of eight.
fn header(in_file_order: &[PlannedTensor]) -> Result<Vec<u8>, String> {
    let mut end = 0_usize;
    let mut entries = Vec::new();
    let mut names = BTreeSet::new();
    for tensor in in_file_order {
        let PlannedTensor { name, dtype, shape } = tensor;
        if name == "__metadata__" || !names.insert(name) {
            return Err(format!(
                "the tensor name '{name}' is reserved or comes twice"
            ));
        }
        let start = end;
        let bytes = dtype.bytes_of(shape);
        end = bytes
            .and_then(|bytes| end.checked_add(bytes))
            .ok_or_else(|| format!("tensor '{name}' of shape {shape:?} is too large"))?;
        let entry = FileEntry {
            dtype: file_dtype(*dtype),
            shape: shape.clone(),
            data_offsets: (start, end),
        };
        entries.push((name.clone(), entry));
    }
    let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let metadata = Metadata::new(Some(format), entries).map_err(|cause| cause.to_string())?;
    let mut header = serde_json::to_vec(&metadata).map_err(|cause| cause.to_string())?;
    header.resize(header.len().next_multiple_of(LENGTH_BYTES), b' ');
    match header.len() > MAX_HEADER_BYTES {
        true => Err(format!(
            "{} tensors are too many for one file",
            in_file_order.len()
        )),
        false => Ok(header),
    }
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
