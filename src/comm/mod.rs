//! How stages exchange buffers: point to point, and sums over all.

pub mod in_process;
pub mod nccl;
pub mod peer_copy;

use std::sync::Arc;

use crate::backend::{Backend, BackendError, Plain, Pulse};

/// Which way activations or their gradients go through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flow {
    /// Activations, from the embedding to the head.
    Forward,
    /// Their gradients, from the head to the embedding.
    Backward,
}

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// The other stage has ended; what ended it is reported by itself.
    #[error("stage {peer} is gone")]
    PeerGone {
        /// The other stage.
        peer: usize,
    },
    /// A transfer before the transport was started.
    #[error("the transport was used before it was started; this is a bug")]
    NotStarted,
    /// The worker was told to give up while it waited; why is reported by whoever told it.
    #[error("gave up waiting, because the run is ending")]
    Stopped,
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

/// Values that go to or come from another stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parcel {
    /// The other stage.
    pub peer: usize,
    /// How many values.
    pub len: usize,
}

/// What a transport makes room for when it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Most values of an [`Transport::all_reduce_sum`].
    pub all_reduce: usize,
}

/// Where one flow of a stage arrives and leaves: buffers that the worker swaps with its own, so that
/// transfers go on while it computes.
pub struct Mailbox<B: Backend, T: Plain> {
    /// Which way.
    pub flow: Flow,
    /// What [`Transport::arrived`] has made ready.
    pub incoming: B::Buffer<T>,
    /// What the next [`Transport::exchange`] sends; may be written after [`Transport::sent`].
    pub outgoing: B::Buffer<T>,
    /// What the last exchange is to receive, until it has arrived.
    pub awaited: Option<Parcel>,
}

impl<B: Backend, T: Plain> Mailbox<B, T> {
    /// Room for messages of up to `len` values.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(backend: &B, flow: Flow, len: usize) -> Result<Self, BackendError> {
        Ok(Mailbox {
            flow,
            incoming: backend.zeros(len)?,
            outgoing: backend.zeros(len)?,
            awaited: None,
        })
    }
}

/// The connections of one stage to the others.
///
/// Transfers of one flow happen in the order in which they are posted, and the two flows do not wait for
/// each other. No call waits for a transfer on a device: waits are put into the device's queue, in front
/// of what is computed next.
pub trait Transport<B: Backend> {
    /// This stage.
    fn rank(&self) -> usize;

    /// Number of stages.
    fn stages(&self) -> usize;

    /// Connects, on the worker's own thread, when every stage has loaded what it needs. Whatever the
    /// transport waits for later, it gives up when `pulse` is stopped.
    ///
    /// # Errors
    /// Another stage is gone, or libraries or devices fail.
    fn start(&mut self, backend: &B, pulse: &Arc<Pulse>, room: Room) -> Result<(), CommError>;

    /// Posts, as one group, the send of the first values of `mail.outgoing` and the receive into
    /// `mail.incoming`, behind everything computed so far. Neither is waited for.
    ///
    /// # Errors
    /// Another stage is gone, or the device fails.
    fn exchange<T: Plain>(
        &mut self,
        backend: &B,
        mail: &mut Mailbox<B, T>,
        send: Option<Parcel>,
        receive: Option<Parcel>,
    ) -> Result<(), CommError>;

    /// What is computed from here on finds in `mail.incoming` what the last exchange received; nothing
    /// happens where it received nothing.
    ///
    /// # Errors
    /// The other stage is gone or out of step, or the device fails.
    fn arrived<T: Plain>(&mut self, backend: &B, mail: &mut Mailbox<B, T>)
    -> Result<(), CommError>;

    /// What is computed from here on may overwrite `mail.outgoing`.
    ///
    /// # Errors
    /// The other stage is gone, or the device fails.
    fn sent<T: Plain>(&mut self, backend: &B, mail: &mut Mailbox<B, T>) -> Result<(), CommError>;

    /// Sends the first `len` values of `ours` to stage `peer`, which does the same, and receives
    /// its values into `theirs`; done before what is computed from here on.
    ///
    /// # Errors
    /// The other stage is gone or out of step, or the device fails.
    fn trade(
        &mut self,
        backend: &B,
        peer: usize,
        ours: &B::Buffer<f32>,
        theirs: &mut B::Buffer<f32>,
        len: usize,
    ) -> Result<(), CommError>;

    /// Replaces the first `len` values of `x` by their sums over all stages. Every stage gets the same
    /// bits; they do not depend on the transport where, for each value, all stages but one hold zero.
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
