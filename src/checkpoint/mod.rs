//! Files with tensors in them: plain host tensors, sources to read them from, folders to write them to.
//!
//! This room imports nothing of the rest of the crate. It knows files, not models: which tensors a
//! model needs and how they are called stands in `model::weights`.
//!
//! Reading order: [`HostTensor`] is what everything small here carries, [`OpenTensor`] what a model's
//! weights go through on their way to a device; [`safetensors`] and [`torch_bin`]
//! read one file each; [`model_folder`] reads a Hugging Face folder of them; [`adapter_files`] and
//! [`prefix_files`] read and write what a fine-tuning leaves behind; [`run_state`] saves a run so that
//! a kill at any moment loses at most the work since the last save.
//!
//! Two rules hold throughout. What a file says about itself is checked against the file before
//! memory is taken for it, and a file appears under its final name only when it is complete.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

mod adapter_config;
pub mod adapter_files;
mod durable;
mod error;
mod input_file;
mod manifest;
pub mod model_folder;
pub mod pieces;
pub mod prefix_files;
pub mod run_state;
pub mod safetensors;
pub mod synthetic;
mod tensor;
pub mod torch_bin;
mod torch_map;
mod torch_pickle;
pub mod torch_zip;
mod zip_end;

pub use adapter_files::{LoraFileConfig, LoraFiles};
pub use error::CheckpointError;
pub use model_folder::ModelFolder;
pub use pieces::OpenTensor;
pub use prefix_files::PrefixFiles;
pub use synthetic::Synthetic;
pub use tensor::{Dtype, HostTensor};

/// The most dimensions of a tensor in a file; models have two.
const MAX_RANK: usize = 8;

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
    ///
    /// # Errors
    /// There is no such tensor, or its file cannot be read or no longer holds what it said at first.
    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError>;

    /// What `name` is made of, where it stands in no file and is to be made where it is needed.
    fn synthetic(&self, _name: &str) -> Option<Synthetic> {
        None
    }

    /// Opens one tensor, to be taken piece by piece: from the file itself where it stands there in one
    /// piece, else from a copy of this one tensor.
    ///
    /// # Errors
    /// As [`TensorSource::read`].
    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        self.read(name)?.try_into()
    }
}

/// Opens one file of tensors: safetensors when it is called so, a PyTorch file otherwise.
///
/// # Errors
/// As [`safetensors::SafetensorsFile::open`] and [`torch_bin::TorchBinFile::open`].
pub fn open_tensor_file(path: &Path) -> Result<Box<dyn TensorSource>, CheckpointError> {
    if path.extension().is_some_and(|kind| kind == "safetensors") {
        Ok(Box::new(safetensors::SafetensorsFile::open(path)?))
    } else {
        Ok(Box::new(torch_bin::TorchBinFile::open(path)?))
    }
}

/// Reads every tensor of a source into memory; meant for adapters and run state, not for models.
///
/// # Errors
/// The first tensor that cannot be read.
pub fn read_all(
    source: &dyn TensorSource,
) -> Result<BTreeMap<String, HostTensor>, CheckpointError> {
    let read = |name: String| source.read(&name).map(|tensor| (name, tensor));
    source.names().into_iter().map(read).collect()
}
