//! Why something could not be exported.

use std::path::PathBuf;

use crate::adapter::AdapterError;
use crate::checkpoint::{CheckpointError, Dtype};
use crate::config::error::ConfigError;
use crate::model::ModelError;
use crate::quant::QuantError;
use crate::report::FailureClass;

/// Why something could not be exported.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model's tensors.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A prefix and a whole model.
    #[error(
        "a prefix (P-Tuning v2) is no change of weights and cannot be merged into the model: use \
         --format thudm, which writes it as THUDM's ptuning does, to be loaded beside the model"
    )]
    PrefixMerged,
    /// A prefix and PEFT.
    #[error("a prefix (P-Tuning v2) has no PEFT form here: use --format thudm")]
    PrefixAsPeft,
    /// LoRA and a prefix checkpoint.
    #[error(
        "--format thudm is the form of a prefix (P-Tuning v2), and the adapter is a LoRA: use merged or \
         peft"
    )]
    LoraAsThudm,
    /// The form of an adapter without one.
    #[error("--format peft and --format thudm write an adapter: give its folder with --adapter")]
    NoAdapter,
    /// Settings of weights where none are written.
    #[error(
        "--dtype and --quantization are for a whole model (--format merged): an adapter is written as \
         it was trained"
    )]
    NoWeightsToStore,
    /// The official folders of codes have halves beside them.
    #[error("--quantization stores everything else as float16: leave --dtype out")]
    CodesBesideOthers,
    /// A layout for which no folders of codes exist.
    #[error(
        "{model}: the int8 and int4 layout belongs to ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B; no \
         program would load codes under the names of this model. Leave --quantization out",
        model = model.display()
    )]
    NoLayoutOfCodes {
        /// The model folder.
        model: PathBuf,
    },
    /// Weights that have no codes.
    #[error("tensor `{tensor}` cannot be quantised: {reason}")]
    Quantised {
        /// The weight.
        tensor: String,
        /// Why.
        reason: QuantError,
    },
    /// A value beyond what is written, or none at all.
    #[error(
        "tensor `{tensor}` holds {value} in row {row}, which {dtype} cannot store: use --dtype \
         {instead}, or check the files"
    )]
    Range {
        /// The tensor.
        tensor: String,
        /// Its row, from 0.
        row: usize,
        /// The value before it was rounded.
        value: f32,
        /// The element type.
        dtype: Dtype,
        /// One that has room for it.
        instead: &'static str,
    },
    /// An output folder with something in it.
    #[error("{folder} is there already and not empty: name a new folder", folder = folder.display())]
    FolderTaken {
        /// The folder.
        folder: PathBuf,
    },
    /// A signal came first.
    #[error("stopped before the folder was complete; nothing was written")]
    Interrupted,
}

impl ExportError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            ExportError::Interrupted => return FailureClass::Interrupted,
            ExportError::Checkpoint(error) => error.is_machine(),
            ExportError::Model(error) => error.is_machine(),
            ExportError::Adapter(error) => error.is_machine(),
            ExportError::Config(_)
            | ExportError::PrefixMerged
            | ExportError::PrefixAsPeft
            | ExportError::LoraAsThudm
            | ExportError::NoAdapter
            | ExportError::NoWeightsToStore
            | ExportError::CodesBesideOthers
            | ExportError::NoLayoutOfCodes { .. }
            | ExportError::Quantised { .. }
            | ExportError::Range { .. }
            | ExportError::FolderTaken { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}
