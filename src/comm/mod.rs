//! How stages exchange buffers: point to point, and sums over all.

pub mod in_process;

use crate::backend::{Backend, BackendError, Plain};

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// The other stage has ended; what ended it is reported by itself.
    #[error("stage {peer} is gone")]
    PeerGone {
        /// The other stage.
        peer: usize,
    },
    /// The other stage sent something else than what was expected: the stages are out of step.
    #[error("stage {peer} sent {found} bytes where {expected} were expected")]
    OutOfStep {
        /// The other stage.
        peer: usize,
        /// Bytes received.
        found: usize,
        /// Bytes expected.
        expected: usize,
    },
    /// Device.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// The connections of one stage to the others.
///
/// Sends do not wait for the receiver. A transport whose sends do must group the output of an action
/// with the input of the next where both go to the same stage (see `pipeline::schedule`).
pub trait Transport<B: Backend> {
    /// This stage.
    fn rank(&self) -> usize;

    /// Number of stages.
    fn stages(&self) -> usize;

    /// Sends the first `len` values of `x` to stage `to`.
    ///
    /// # Errors
    /// The other stage is gone, or the device fails.
    fn send<T: Plain>(
        &mut self,
        backend: &B,
        to: usize,
        x: &B::Buffer<T>,
        len: usize,
    ) -> Result<(), CommError>;

    /// Receives `len` values from stage `from` into the start of `x`.
    ///
    /// # Errors
    /// The other stage is gone or out of step, or the device fails.
    fn recv<T: Plain>(
        &mut self,
        backend: &B,
        from: usize,
        x: &mut B::Buffer<T>,
        len: usize,
    ) -> Result<(), CommError>;

    /// Replaces the first `len` values of `x` by their sums over all stages, added in rank order, so
    /// that every stage gets the same bits.
    ///
    /// # Errors
    /// Another stage is gone or out of step, or the device fails.
    fn all_reduce_sum(
        &mut self,
        backend: &B,
        x: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError>;
}
