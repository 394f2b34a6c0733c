//! PyTorch `.bin` files, the zip kind and the older stream kind, read without running their pickles.
//!
//! The parsing is the `pytorch-reader` crate's. What is added here: limits that follow from the size
//! of the file, a list of element types, an error where the crate is content with no tensors, and the
//! place of a tensor in the file, so that it need not be taken into memory as a whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pytorch_reader::{DType as FileDtype, FileFormat, PytorchReader, Tensor};

use super::input_file::open_plain;
use super::torch_map::{Said, TorchMap};
use super::{CheckpointError, Dtype, HostTensor, OpenTensor, TensorInfo, TensorSource};

/// The most bytes of one file: five times ChatGLM-6B in float32.
const MAX_FILE_BYTES: u64 = 128 << 30;

/// The most tensors of one file: two hundred times those of ChatGLM-6B.
const MAX_TENSORS: usize = 100_000;

/// How often the tensors of a file together may repeat its bytes; tied weights repeat some once.
const MAX_SHARING: u64 = 16;

/// One PyTorch file; the tensors are read from it one at a time, or opened where they lie in it.
#[derive(Debug)]
pub struct TorchBinFile {
    path: PathBuf,
    tensors: BTreeMap<String, (Dtype, Tensor)>,
    /// Nothing for the older stream kind.
    map: Option<TorchMap>,
}

impl TorchBinFile {
    /// Opens a file and reads its list of tensors.
    ///
    /// # Errors
    /// The file cannot be read, is a Git LFS pointer, is no PyTorch file or a damaged one, holds no
    /// tensors, has a tensor of an unsupported element type or one that claims more bytes than the
    /// file has.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let (_, size) = open_plain(path)?;
        if size > MAX_FILE_BYTES {
            return Err(CheckpointError::TooLarge {
                path: path.to_owned(),
                size,
                limit: MAX_FILE_BYTES,
                what: "a PyTorch file",
            });
        }
        let damaged = |reason: String| CheckpointError::damaged(path, reason);
        let reader = PytorchReader::new(path).map_err(|cause| damaged(cause.to_string()))?;
        let format = &reader.metadata().format_type;
        if !matches!(format, FileFormat::Zip | FileFormat::Legacy) {
            return Err(damaged(format!(
                "it is a {format:?} file, not one that torch.save writes"
            )));
        }
        let mut tensors = BTreeMap::new();
        for (name, tensor) in reader.into_tensors() {
            let Some(dtype) = allowed(tensor.dtype()) else {
                return Err(CheckpointError::UnsupportedDtype {
                    path: path.to_owned(),
                    tensor: name,
                    found: format!("{:?}", tensor.dtype()),
                });
            };
            tensors.insert(name, (dtype, tensor));
        }
        check_sizes(&tensors, size).map_err(damaged)?;
        let said = tensors.iter().map(|(name, tensor)| said(name, tensor));
        Ok(Self {
            path: path.to_owned(),
            map: TorchMap::open(path, said),
            tensors,
        })
    }
}

fn said<'a>(name: &'a str, (dtype, tensor): &'a (Dtype, Tensor)) -> Said<'a> {
    Said {
        name,
        dtype: *dtype,
        shape: tensor.shape(),
    }
}

/// A view can repeat its storage without end, so a file of a few bytes can ask for any amount of
/// memory; real weights are stored in full.
fn check_sizes(tensors: &BTreeMap<String, (Dtype, Tensor)>, file_bytes: u64) -> Result<(), String> {
    if tensors.is_empty() {
        return Err("it holds no tensors".to_owned());
    }
    if tensors.len() > MAX_TENSORS {
        return Err(format!("it holds {} tensors", tensors.len()));
    }
    let mut total = 0_u64;
    for (name, (dtype, tensor)) in tensors {
        let shape = tensor.shape();
        let bytes = dtype.bytes_of(shape).map_or(u64::MAX, |bytes| bytes as u64);
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
        let mapped = self.tensors.get(name).and_then(|tensor| {
            let map = self.map.as_ref()?;
            map.tensor(&self.path, &said(name, tensor))
        });
        mapped.unwrap_or_else(|| self.read(name)?.try_into())
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
        FileDtype::Bool => Dtype::Bool,
        FileDtype::U16 | FileDtype::U32 | FileDtype::U64 => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_torch_saves_is_mapped_tensor_by_tensor() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b");
        for file in [
            "model_bin/pytorch_model-00001-of-00002.bin",
            "model_bin/pytorch_model-00002-of-00002.bin",
            "ptuning_checkpoint/pytorch_model.bin",
        ] {
            let path = golden.join(file);
            let opened = TorchBinFile::open(&path).unwrap();
            let map = opened.map.as_ref().unwrap();
            for name in opened.names() {
                let mapped = map.tensor(&path, &said(&name, &opened.tensors[&name]));
                let mapped = mapped.unwrap_or_else(|| panic!("{file}: {name} is not mapped"));
                let read = opened.read(&name).unwrap();
                assert!(mapped.unwrap().into_bytes() == read.bytes);
                // The pages that were given up come back.
                assert!(opened.open(&name).unwrap().into_bytes() == read.bytes);
            }
        }
    }
}
