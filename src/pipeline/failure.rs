//! What ended a worker, and where it was.

use std::time::Duration;

use crate::backend::BackendError;
use crate::backend::cuda::CudaError;
use crate::comm::CommError;
use crate::config::run::Device;
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
    /// No sign of life.
    #[error("no sign of life for {} s: {stall}", .silent.as_secs_f64().round())]
    Stalled {
        /// How long.
        silent: Duration,
        /// What was seen of it.
        stall: Stall,
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
    /// The worker's thread is gone, and said nothing.
    #[error("the worker ended without a word; this is a bug")]
    Vanished,
    /// Something was asked of stages that had failed before.
    #[error("the stages have ended with an earlier failure")]
    Over,
}

/// What was seen of a stage that gave no sign of life.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Stall {
    /// The worker's thread does not even look whether it is to give up.
    #[error("its thread does not come back from a call{}", last_seen(.device_at))]
    Thread {
        /// What the device was at when it was last heard of, where that is something else.
        device_at: Option<String>,
    },
    /// The thread is alive; the device does not finish what it is at.
    #[error("the device does not finish what it is at")]
    Device,
    /// The device waits for something that was sent.
    #[error("nothing arrives from {}, which has sent it", stages(.from))]
    Transfer {
        /// The senders.
        from: Vec<usize>,
    },
    /// Every stage that has not answered waits for others.
    #[error("the stages wait for each other: {waits}")]
    Circle {
        /// Who waits where and for whom.
        waits: String,
    },
}

fn last_seen(device_at: &Option<String>) -> String {
    match device_at {
        Some(action) => format!("; its device was last seen at {action}"),
        None => String::new(),
    }
}

/// Stages in words.
pub(super) fn stages(ranks: &[usize]) -> String {
    let numbers: Vec<String> = ranks.iter().map(usize::to_string).collect();
    match ranks.len() {
        0 => "all stages".to_owned(),
        1 => format!("stage {}", numbers[0]),
        _ => format!("stages {}", numbers.join(", ")),
    }
}

impl Cause {
    fn of_backend(&self) -> Option<&BackendError> {
        match self {
            Cause::Comm(CommError::Backend(error)) | Cause::Model(ModelError::Backend(error)) => {
                Some(error)
            }
            _ => None,
        }
    }

    /// Whether it comes from work that was queued before, while the worker was on at something else.
    pub(super) fn is_late(&self) -> bool {
        matches!(
            self.of_backend(),
            Some(BackendError::Cuda(
                CudaError::Lost { .. } | CudaError::Nccl { .. }
            ))
        )
    }
}

impl From<BackendError> for Cause {
    fn from(error: BackendError) -> Self {
        Cause::Model(ModelError::Backend(error))
    }
}

/// The failure that ended a run.
#[derive(Debug, thiserror::Error)]
#[error(
    "stage {rank}{}, {doing} on {}{}: {cause}",
    .step.map(|step| format!(", step {step}")).unwrap_or_default(),
    title(.device),
    .device_at.as_ref().map(|action| format!(", which had got to {action}")).unwrap_or_default()
)]
pub struct Failure {
    /// The stage.
    pub rank: usize,
    /// Where it runs.
    pub device: Device,
    /// Step of the run, from 1, where it was in one.
    pub step: Option<u64>,
    /// The action: `F3`, `B0`, `update`, `loading`.
    pub doing: String,
    /// How far the device had got in that step, where the cause lies in what was queued on it.
    pub device_at: Option<String>,
    /// Why.
    pub cause: Cause,
}

fn title(device: &Device) -> String {
    match device {
        Device::Cpu => "cpu".to_owned(),
        Device::Cuda(ordinal) => format!("CUDA device {ordinal}"),
    }
}

impl Failure {
    /// Whether the machine or a bug is to blame, not the user's files or settings.
    pub fn is_machine(&self) -> bool {
        match &self.cause {
            Cause::Model(error) => error.is_machine(),
            Cause::ZeroGradient { .. } => false,
            Cause::Comm(_)
            | Cause::NeverWritten { .. }
            | Cause::Stalled { .. }
            | Cause::Panic { .. }
            | Cause::Thread(_)
            | Cause::Vanished
            | Cause::Over => true,
        }
    }

    /// Whether it only follows from another stage's failure.
    pub fn is_consequence(&self) -> bool {
        match &self.cause {
            Cause::Comm(CommError::PeerGone { .. } | CommError::Stopped) => true,
            cause => matches!(
                cause.of_backend(),
                Some(
                    BackendError::Stopped
                        | BackendError::Cuda(CudaError::Nccl { remote: true, .. })
                )
            ),
        }
    }
}
