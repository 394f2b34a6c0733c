//! The model of one pipeline stage: GLM's blocks, forward and backward by hand.

pub mod activations;
pub mod attention;
pub mod batch;
pub mod block;
pub mod embedding;
pub mod head;
pub mod linear;
pub mod load;
pub mod memory;
pub mod mlp;
pub mod names;
pub mod norm;
pub mod qkv;
pub mod quantised;
pub mod rotary;
pub mod stage;
pub mod trainables;
pub mod weights;

use std::path::PathBuf;

use crate::adapter::AdapterError;
use crate::backend::BackendError;
use crate::checkpoint::{CheckpointError, Dtype};
use crate::quant::QuantError;

/// Why a model could not be put together or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Tensors that the model needs are not in its folder.
    #[error(
        "{count} tensors of the model are missing, the first is `{name}`; is the download complete?"
    )]
    MissingTensor {
        /// The first of them.
        name: String,
        /// How many.
        count: usize,
    },
    /// Tensors that do not belong to the model.
    #[error("{file}: holds {count} tensors that this model does not have, the first is `{name}`")]
    ExtraTensor {
        /// File of the first of them.
        file: PathBuf,
        /// The first of them.
        name: String,
        /// How many.
        count: usize,
    },
    /// A tensor whose shape contradicts `config.json`.
    #[error(
        "{file}: `{name}` has shape {found:?}; config.json gives {expected:?}: are both from one model folder?"
    )]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<usize>,
        /// Shape by config.json.
        expected: Vec<usize>,
    },
    /// A tensor of numbers where codes should be, or of codes where numbers should be.
    #[error(
        "{file}: `{name}` holds {found}, but config.json {expected}: are both from one model folder?"
    )]
    WrongElements {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its elements.
        found: Dtype,
        /// What config.json says.
        expected: &'static str,
    },
    /// A quantised folder, and other codes asked for.
    #[error(
        "{folder} holds {found} weights, of which {asked} cannot be made: leave out \
         `quantization = \"{asked}\"` (--quantization) to use them as they are, or give the folder of \
         the full model (THUDM/chatglm-6b)"
    )]
    OtherCodes {
        /// The model folder.
        folder: PathBuf,
        /// What it holds.
        found: &'static str,
        /// What was asked for.
        asked: &'static str,
    },
    /// Whole-model training from a quantised folder.
    #[error(
        "{found} weights cannot be trained: use adapter.kind = \"lora\" or \"prefix\", or the folder of \
         the full model (THUDM/chatglm-6b)"
    )]
    TrainedCodes {
        /// What it holds.
        found: &'static str,
    },
    /// A weight that cannot be quantised, or a quantised one that is damaged.
    #[error("{file}: `{name}`: {reason}")]
    Quantised {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong with it.
        reason: QuantError,
    },
    /// P-Tuning on a model whose original has no prefix encoder.
    #[error(
        "adapter.kind = \"prefix\": GLM-4-9B in transformers' own form has no prefix encoder, so that \
         nothing could load the result: use adapter.kind = \"lora\""
    )]
    NoPrefixEncoder,
    /// A LoRA target that the model does not have.
    #[error(
        "target_modules: this model has no linear layer `{name}`; it has {known} (all of them: all-linear)"
    )]
    UnknownTarget {
        /// As configured.
        name: String,
        /// What there is.
        known: String,
    },
    /// A micro-batch that does not fit the room that was planned for it.
    #[error(
        "a micro-batch of {rows} tokens in {sequences} sequences exceeds the planned {max_rows} in {max_sequences}"
    )]
    TooLong {
        /// Tokens of the micro-batch.
        rows: usize,
        /// Its sequences.
        sequences: usize,
        /// Tokens planned for.
        max_rows: usize,
        /// Sequences planned for.
        max_sequences: usize,
    },
    /// A position beyond the rotary tables.
    #[error("position {position} is beyond max_sequence_length {max}: shorten the row")]
    Position {
        /// As found.
        position: u32,
        /// Largest allowed plus one.
        max: usize,
    },
    /// A token id beyond the vocabulary.
    #[error("token id {id} is beyond the vocabulary of {vocab_size}")]
    TokenId {
        /// As found.
        id: u32,
        /// V.
        vocab_size: usize,
    },
    /// Files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Trainable parameters.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// Device.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl ModelError {
    /// Whether the machine or a bug is to blame, not the user's files or settings.
    pub fn is_machine(&self) -> bool {
        match self {
            ModelError::TooLong { .. } => true,
            ModelError::Backend(error) => error.is_machine(),
            ModelError::Adapter(error) => error.is_machine(),
            ModelError::Checkpoint(error) => error.is_machine(),
            _ => false,
        }
    }
}
