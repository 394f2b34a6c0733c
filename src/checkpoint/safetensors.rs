//! The safetensors format: a reader that takes tensors out of the file by position, and an atomic
//! writer of one file.
//!
//! The file is eight bytes of header length, a JSON header, then the tensors without gaps
//! (<https://github.com/huggingface/safetensors>).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use ::safetensors::Dtype as FileDtype;
use ::safetensors::tensor::{Metadata, TensorInfo as FileEntry};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::input_file::open_plain;
use super::pieces::Stretch;
use super::{
    CheckpointError, Dtype, HostTensor, MAX_RANK, OpenTensor, TensorInfo, TensorSource, durable,
};

const LENGTH_BYTES: usize = 8;

/// The most bytes of a header: a hundred times that of ChatGLM-6B.
const MAX_HEADER_BYTES: usize = 8 << 20;

/// The key of the header that is no tensor.
const METADATA: &str = "__metadata__";

/// One safetensors file; the tensors are not touched before they are read.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Where it begins in the file.
    start: u64,
    len: usize,
}

impl SafetensorsFile {
    /// Opens a file and checks its header against its size.
    ///
    /// # Errors
    /// The file cannot be read, is a Git LFS pointer, is cut short, has a header that contradicts
    /// itself or the file, or has a tensor of an unsupported element type.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, size) = open_plain(path)?;
        let damaged = |reason: String| CheckpointError::damaged(path, reason);
        let mut lead = [0; LENGTH_BYTES];
        if size < LENGTH_BYTES as u64 {
            return Err(damaged(format!(
                "{size} bytes are too few for a safetensors file"
            )));
        }
        (&file)
            .read_exact(&mut lead)
            .map_err(CheckpointError::read(path))?;
        let length = u64::from_le_bytes(lead);
        let data_bytes = size
            .checked_sub(LENGTH_BYTES as u64)
            .and_then(|rest| rest.checked_sub(length))
            .ok_or_else(|| {
                damaged(format!(
                    "its header claims {length} bytes, the file has {size}"
                ))
            })?;
        if length > MAX_HEADER_BYTES as u64 {
            return Err(damaged(format!(
                "its header of {length} bytes is too large"
            )));
        }
        let mut header = Vec::new();
        (&file)
            .take(length)
            .read_to_end(&mut header)
            .map_err(CheckpointError::read(path))?;
        let Header(entries) = serde_json::from_slice(&header)
            .map_err(|cause| damaged(format!("its header is not valid ({cause})")))?;
        check(&entries, data_bytes).map_err(damaged)?;
        let data_start = LENGTH_BYTES as u64 + length;
        let entry = |(name, entry): (String, FileEntry)| {
            let Some(dtype) = allowed(entry.dtype) else {
                return Err(CheckpointError::UnsupportedDtype {
                    path: path.to_owned(),
                    tensor: name,
                    found: entry.dtype.to_string(),
                });
            };
            let (start, end) = entry.data_offsets;
            let entry = Entry {
                dtype,
                shape: entry.shape,
                start: data_start + start as u64,
                len: end - start,
            };
            Ok((name, entry))
        };
        let entries = entries.into_iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Self {
            path: path.to_owned(),
            file,
            entries,
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
        let open = self.open(name)?;
        let (dtype, shape) = (open.dtype(), open.shape().to_vec());
        HostTensor::new(dtype, shape, open.into_bytes()?)
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| CheckpointError::NoSuchTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            })?;
        let stretch = Stretch {
            path: &self.path,
            file: &self.file,
            start: entry.start,
        };
        OpenTensor::in_file(entry.dtype, entry.shape.clone(), entry.len, stretch)
    }
}

/// The tensors of a header. Read here and not by the crate, which lets the last of two entries of one
/// name win without a word.
struct Header(BTreeMap<String, FileEntry>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry: FileEntry = map.next_value()?;
                    if entries.contains_key(&name) {
                        return Err(A::Error::custom(format!("tensor '{name}' comes twice")));
                    }
                    entries.insert(name, entry);
                }
                Ok(Header(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// Whether the tensors stand in the file one after another, without gaps and overlaps, each in as many
/// bytes as its shape needs, and all of them in as many as there are.
fn check(entries: &BTreeMap<String, FileEntry>, data_bytes: u64) -> Result<(), String> {
    let mut in_order: Vec<(&String, &FileEntry)> = entries.iter().collect();
    in_order.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut end_before = 0;
    let mut before = None;
    for (name, entry) in in_order {
        let (start, end) = entry.data_offsets;
        match before {
            _ if start == end_before => {}
            Some(before) if start < end_before => {
                return Err(format!("tensors '{before}' and '{name}' overlap"));
            }
            _ => {
                return Err(format!(
                    "bytes {end_before} to {start}, in front of '{name}', belong to no tensor"
                ));
            }
        }
        let shape = &entry.shape;
        if shape.len() > MAX_RANK {
            let rank = shape.len();
            return Err(format!("tensor '{name}' has {rank} dimensions"));
        }
        let bits = shape
            .iter()
            .try_fold(entry.dtype.bitsize(), |bits, &extent| {
                bits.checked_mul(extent)
            });
        let bytes = bits
            .filter(|bits| bits.is_multiple_of(8))
            .map(|bits| bits / 8);
        if end < start || bytes != Some(end - start) {
            return Err(format!(
                "tensor '{name}' of type {} and shape {shape:?} cannot stand in bytes {start} to {end}",
                entry.dtype
            ));
        }
        (end_before, before) = (end, Some(name));
    }
    if end_before as u64 != data_bytes {
        return Err(format!(
            "its header describes {end_before} bytes of tensors, the file has {data_bytes}"
        ));
    }
    Ok(())
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
        if name == METADATA || !names.insert(name) {
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
