//! What is trained: parameters with their optimiser state, LoRA, and the prefix encoder.

pub mod files;
pub mod initial;
pub mod lora;
pub mod parameter;
pub mod prefix;

pub use parameter::{Parameter, ParameterSpec, ParameterState, Role, Slice};

use std::path::PathBuf;

use crate::backend::BackendError;
use crate::checkpoint::CheckpointError;

/// Why trainable parameters could not be made, read or put together.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// A tensor that a file should hold is not in it.
    #[error("{file}: tensor `{name}` is missing; found {found}")]
    MissingTensor {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What is there, shortened.
        found: String,
    },
    /// A tensor that nothing in this model takes.
    #[error("{file}: tensor `{name}` fits nothing in this model with these settings")]
    ExtraTensor {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor of another shape than the model and the settings give.
    #[error(
        "{file}: tensor `{name}` has shape {found:?}, the model and the settings give {expected:?}"
    )]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape here.
        expected: Vec<usize>,
    },
    /// A setting of the run and one of the adapter's files differ.
    #[error("{file}: {field} is {found} there and {expected} in this run's configuration")]
    Disagreement {
        /// The file.
        file: PathBuf,
        /// The setting.
        field: &'static str,
        /// Value in the file.
        found: String,
        /// Value in the configuration.
        expected: String,
    },
    /// A value that is not a finite number.
    #[error("{file}: tensor `{name}` holds a value that is not finite")]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
    },
    /// Files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Device.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl AdapterError {
    /// Whether the machine or a bug is to blame, not the user's files or settings.
    pub fn is_machine(&self) -> bool {
        match self {
            AdapterError::Backend(_) => true,
            AdapterError::Checkpoint(error) => error.is_machine(),
            _ => false,
        }
    }
}
