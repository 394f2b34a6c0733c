//! What can go wrong with a device.

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Memory for a buffer could not be had.
    #[error(
        "{device}: no memory for {:.1} MiB more: use more devices, a smaller micro_batch_size, shorter \
         rows or recompute = \"block\"; `mp-train plan` shows what each stage takes",
        *bytes as f64 / f64::from(1 << 20)
    )]
    OutOfMemory {
        /// The device, in words.
        device: String,
        /// Size of the buffer asked for.
        bytes: usize,
    },
    /// The threads of the CPU backend could not be started.
    #[error("cannot start {threads} compute threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// What the system said.
        reason: String,
    },
    /// The worker was told to give up while it waited for its device.
    #[error("gave up waiting for the device, because the run is ending")]
    Stopped,
    /// A CUDA device, its driver or its libraries.
    #[error(transparent)]
    Cuda(#[from] super::cuda::CudaError),
}

impl BackendError {
    /// Whether the machine or a bug is to blame, not what was asked for.
    pub fn is_machine(&self) -> bool {
        match self {
            BackendError::OutOfMemory { .. }
            | BackendError::Threads { .. }
            | BackendError::Stopped => true,
            BackendError::Cuda(error) => error.is_machine(),
        }
    }
}
