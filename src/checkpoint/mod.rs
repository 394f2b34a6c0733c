//! Files with tensors in them: plain host tensors, sources to read them from, sinks to write them to.
//!
//! This room imports nothing of the rest of the crate. It knows files, not models: which tensors a
//! model needs and how they are called stands in `model::weights`.

use std::path::PathBuf;

pub mod adapter_files;
pub mod run_state;
pub mod safetensors;
pub mod torch_bin;

/// The element type of a [`HostTensor`], by the names safetensors uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// One byte, 0 or 1.
    Bool,
}

/// A tensor in host memory: contiguous rows, little-endian bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Element type of `bytes`.
    pub dtype: Dtype,
    /// Extent of each dimension, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements, contiguous, little-endian.
    pub bytes: Vec<u8>,
}

/// What a source knows about a tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: Dtype,
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// The file that holds it, for messages.
    pub file: PathBuf,
}

/// Something tensors can be read from by name, one at a time, from several threads.
pub trait TensorSource: Send + Sync {
    /// The names of all tensors, sorted.
    fn names(&self) -> Vec<String>;
    /// What is known about `name`, or `None` when there is no such tensor.
    fn info(&self, name: &str) -> Option<TensorInfo>;
    /// Reads one tensor.
    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError>;
}

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// io
    #[error("{path}: {source}")]
    Io {
        /// file
        path: PathBuf,
        /// cause
        source: std::io::Error,
    },
}
