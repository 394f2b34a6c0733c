//! What ended a worker, and where it was.

use crate::backend::BackendError;
use crate::comm::CommError;
use crate::model::ModelError;

/// What ended a worker.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The model or its device.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Another stage.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A trainable tensor that no backward action reached.
    #[error(
        "`{name}` was never written by a backward action, so it would not be trained; this is a bug"
    )]
    NeverWritten {
        /// The tensor.
        name: String,
    },
    /// A trainable tensor whose gradient is exactly zero over a whole step.
    #[error(
        "the gradient of `{name}` is exactly zero over a whole step, so nothing would be learned; \
         are all labels inside the part of a row that the model can see?"
    )]
    ZeroGradient {
        /// The tensor.
        name: String,
    },
    /// The worker panicked.
    #[error("panic: {message}; this is a bug")]
    Panic {
        /// What it said.
        message: String,
    },
    /// The worker's thread could not be started.
    #[error("cannot start the worker thread: {0}")]
    Thread(std::io::Error),
}

impl From<BackendError> for Cause {
    fn from(error: BackendError) -> Self {
        Cause::Model(ModelError::Backend(error))
    }
}

/// The failure that ended a run.
#[derive(Debug, thiserror::Error)]
#[error("stage {rank}{}, {doing}: {cause}", .step.map(|step| format!(", step {step}")).unwrap_or_default())]
pub struct Failure {
    /// The stage.
    pub rank: usize,
    /// Step of the run, from 1, where it was in one.
    pub step: Option<u64>,
    /// The action: `F3`, `B0`, `update`, `loading`.
    pub doing: String,
    /// Why.
    pub cause: Cause,
}

impl Failure {
    /// Whether the machine or a bug is to blame, not the user's files or settings.
    pub fn is_machine(&self) -> bool {
        match &self.cause {
            Cause::Model(error) => error.is_machine(),
            Cause::ZeroGradient { .. } => false,
            Cause::Comm(_)
            | Cause::NeverWritten { .. }
            | Cause::Panic { .. }
            | Cause::Thread(_) => true,
        }
    }

    /// Whether it only follows from another stage's failure.
    pub fn is_consequence(&self) -> bool {
        matches!(self.cause, Cause::Comm(CommError::PeerGone { .. }))
    }
}
