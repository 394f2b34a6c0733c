//! PyTorch `.bin` files, the zip kind and the older stream kind, read without running their pickles.
//!
//! Two readers look at each file and must agree about it. Ours (`torch_map`) goes
//! first: it knows only what a dictionary of tensors needs and refuses the rest by name. Then the
//! `pytorch-reader` crate, whose values are used for tensors that are not in one piece. Added here are
//! limits that follow from the size of the file and a list of element types.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use pytorch_reader::{DType as FileDtype, PytorchReader, Tensor};

use super::input_file::open_plain;
use super::pieces::Stretch;
use super::torch_map::{Mapped, TorchMap};
use super::torch_pickle::Place;
use super::{CheckpointError, Dtype, HostTensor, OpenTensor, TensorInfo, TensorSource};

/// The most bytes of one file: five times ChatGLM-6B in float32.
const MAX_FILE_BYTES: u64 = 128 << 30;

/// How often the tensors of a file together may repeat its bytes; tied weights repeat some once.
const MAX_SHARING: u64 = 16;

/// One PyTorch file; the tensors are read from it one at a time, or opened where they lie in it.
#[derive(Debug)]
pub struct TorchBinFile {
    path: PathBuf,
    file: File,
    tensors: BTreeMap<String, (Dtype, Tensor)>,
    /// Where those stand that are in one piece.
    mapped: BTreeMap<String, Mapped>,
}

impl TorchBinFile {
    /// Opens a file and reads its list of tensors.
    ///
    /// # Errors
    /// The file cannot be read, is a Git LFS pointer, is no PyTorch file or a damaged one, holds no
    /// tensors or anything beside tensors, has a tensor of an unsupported element type or one that
    /// claims more bytes than the file has.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (file, size) = open_plain(path)?;
        if size > MAX_FILE_BYTES {
            return Err(CheckpointError::TooLarge {
                path: path.to_owned(),
                size,
                limit: MAX_FILE_BYTES,
                what: "a PyTorch file",
            });
        }
        let damaged = |reason: String| CheckpointError::damaged(path, reason);
        let map = TorchMap::read(&file, size).map_err(damaged)?;
        check_sizes(&map.places, size).map_err(damaged)?;
        let reader = PytorchReader::new(path).map_err(|cause| damaged(cause.to_string()))?;
        let tensors = agreed(&map.places, reader).map_err(damaged)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            tensors,
            mapped: map.mapped,
        })
    }

    /// A tensor where it lies in the file, if it is in one piece there.
    ///
    /// # Errors
    /// The file was shortened since it was opened, or its bytes are not those that were written.
    fn in_file(
        &self,
        name: &str,
        (dtype, tensor): &(Dtype, Tensor),
    ) -> Option<Result<OpenTensor<'_>, CheckpointError>> {
        let mapped = self.mapped.get(name)?;
        let stretch = Stretch {
            path: &self.path,
            file: &self.file,
            start: mapped.start,
        };
        let checked = || {
            if let Some(crc32) = mapped.crc32
                && stretch.crc32(mapped.len)? != crc32
            {
                let reason = format!("the bytes of tensor '{name}' have another checksum");
                return Err(CheckpointError::damaged(&self.path, reason));
            }
            OpenTensor::in_file(*dtype, tensor.shape().to_vec(), mapped.len, stretch)
        };
        Some(checked())
    }
}

/// The tensors of the crate's reading, if it is ours as well.
fn agreed(
    places: &BTreeMap<String, Place>,
    reader: PytorchReader,
) -> Result<BTreeMap<String, (Dtype, Tensor)>, String> {
    let mut tensors = BTreeMap::new();
    for (name, tensor) in reader.into_tensors() {
        let place = places.get(&name);
        let same = place.filter(|place| {
            file_dtype(place.dtype) == tensor.dtype() && place.shape == tensor.shape()
        });
        let Some(place) = same else {
            return Err(format!("tensor '{name}' can be read in two ways"));
        };
        tensors.insert(name, (place.dtype, tensor));
    }
    match places.keys().find(|name| !tensors.contains_key(*name)) {
        Some(name) => Err(format!("tensor '{name}' can be read in two ways")),
        None => Ok(tensors),
    }
}

/// A view can repeat its storage without end, so a file of a few bytes can ask for any amount of
/// memory; real weights are stored in full.
fn check_sizes(places: &BTreeMap<String, Place>, file_bytes: u64) -> Result<(), String> {
    if places.is_empty() {
        return Err("it holds no tensors".to_owned());
    }
    let mut total = 0_u64;
    for (name, place) in places {
        let shape = &place.shape;
        let bytes = place
            .dtype
            .bytes_of(shape)
            .map_or(u64::MAX, |bytes| bytes as u64);
        total = total.saturating_add(bytes);
        if bytes > file_bytes || total / MAX_SHARING > file_bytes {
            return Err(format!(
                "tensor '{name}' of shape {shape:?} cannot stand in full in a file of {file_bytes} bytes"
            ));
        }
    }
    Ok(())
}

impl TensorSource for TorchBinFile {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(dtype, tensor)| TensorInfo {
            dtype: *dtype,
            shape: tensor.shape().to_vec(),
            file: self.path.clone(),
        })
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        let Some((dtype, tensor)) = self.tensors.get(name) else {
            return Err(CheckpointError::NoSuchTensor {
                path: self.path.clone(),
                tensor: name.to_owned(),
            });
        };
        let bytes = tensor
            .read()
            .map_err(|cause| CheckpointError::damaged(&self.path, cause.to_string()))?;
        HostTensor::new(*dtype, tensor.shape(), bytes)
            .map_err(|cause| cause.in_tensor(&self.path, name))
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        let in_file = self
            .tensors
            .get(name)
            .and_then(|tensor| self.in_file(name, tensor));
        in_file.unwrap_or_else(|| self.read(name)?.try_into())
    }
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
        Dtype::Bool => FileDtype::Bool,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_torch_saves_is_in_one_piece_tensor_by_tensor() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b");
        for file in [
            "model_bin/pytorch_model-00001-of-00002.bin",
            "model_bin/pytorch_model-00002-of-00002.bin",
            "ptuning_checkpoint/pytorch_model.bin",
        ] {
            let path = golden.join(file);
            let opened = TorchBinFile::open(&path).unwrap();
            for name in opened.names() {
                let in_file = opened.in_file(&name, &opened.tensors[&name]);
                let in_file =
                    in_file.unwrap_or_else(|| panic!("{file}: {name} is not in one piece"));
                let read = opened.read(&name).unwrap();
                assert!(in_file.unwrap().into_bytes().unwrap() == read.bytes);
            }
        }
    }
}
