//! A micro-batch on the device.

use super::ModelError;
use super::linear::NoiseKey;
use crate::backend::{Backend, BackendError, Span};

/// A micro-batch in host memory, as the model needs it.
#[derive(Clone, Copy, Debug)]
pub struct BatchRows<'a> {
    /// Token ids, `[T]`.
    pub input_ids: &'a [u32],
    /// First position row, `[T]`.
    pub position: &'a [u32],
    /// Second position row, `[T]`.
    pub block_position: &'a [u32],
    /// The sequences.
    pub spans: &'a [Span],
    /// Rows with a target, ascending, `[R]`.
    pub target_rows: &'a [u32],
    /// What is to be predicted there, `[R]`.
    pub target_ids: &'a [u32],
    /// Row of the key/value cache for each token; empty where there is no cache.
    pub cache_rows: &'a [u32],
    /// Key of the random numbers; `None` outside of training.
    pub noise: Option<NoiseKey>,
}

/// How many tokens and sequences there is room for, and which ids and positions are in range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Tokens of a micro-batch.
    pub rows: usize,
    /// Sequences of a micro-batch.
    pub sequences: usize,
    /// V.
    pub vocab_size: usize,
    /// Positions of the rotary tables.
    pub positions: usize,
}

/// Room for one micro-batch on the device, and the one that is in it.
pub struct Batch<B: Backend> {
    limits: BatchLimits,
    /// Which of the micro-batches in flight through its blocks this is.
    pub slot: usize,
    /// T.
    pub rows: usize,
    /// R, rows with a target.
    pub targets: usize,
    /// The sequences.
    pub spans: Vec<Span>,
    /// Key of the random numbers; `None` outside of training.
    pub noise: Option<NoiseKey>,
    /// `[T]`.
    pub input_ids: B::Buffer<u32>,
    /// `[T]`.
    pub position: B::Buffer<u32>,
    /// `[T]`.
    pub block_position: B::Buffer<u32>,
    /// `[R]`.
    pub target_rows: B::Buffer<u32>,
    /// `[R]`.
    pub target_ids: B::Buffer<u32>,
    /// `[T]`, rows of the key/value cache.
    pub cache_rows: B::Buffer<u32>,
}

impl<B: Backend> Batch<B> {
    /// Room for a micro-batch, the one in `slot`.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(backend: &B, limits: BatchLimits, slot: usize) -> Result<Self, BackendError> {
        Ok(Batch {
            limits,
            slot,
            rows: 0,
            targets: 0,
            spans: Vec::with_capacity(limits.sequences),
            noise: None,
            input_ids: backend.zeros(limits.rows)?,
            position: backend.zeros(limits.rows)?,
            block_position: backend.zeros(limits.rows)?,
            target_rows: backend.zeros(limits.rows)?,
            target_ids: backend.zeros(limits.rows)?,
            cache_rows: backend.zeros(limits.rows)?,
        })
    }

    /// Puts a micro-batch into the room.
    ///
    /// # Errors
    /// More tokens or sequences than there is room for; an id or a position out of range.
    pub fn fill(&mut self, backend: &B, host: BatchRows<'_>) -> Result<(), ModelError> {
        let limits = self.limits;
        if host.input_ids.len() > limits.rows || host.spans.len() > limits.sequences {
            return Err(ModelError::TooLong {
                rows: host.input_ids.len(),
                sequences: host.spans.len(),
                max_rows: limits.rows,
                max_sequences: limits.sequences,
            });
        }
        let ids = host.input_ids.iter().chain(host.target_ids);
        if let Some(&id) = ids
            .into_iter()
            .find(|&&id| id as usize >= limits.vocab_size)
        {
            return Err(ModelError::TokenId {
                id,
                vocab_size: limits.vocab_size,
            });
        }
        let mut positions = host.position.iter().chain(host.block_position);
        if let Some(&position) = positions.find(|&&p| p as usize >= limits.positions) {
            return Err(ModelError::Position {
                position,
                max: limits.positions,
            });
        }
        self.rows = host.input_ids.len();
        self.targets = host.target_rows.len();
        self.spans.clear();
        self.spans.extend_from_slice(host.spans);
        self.noise = host.noise;
        backend.write(&mut self.input_ids, host.input_ids)?;
        backend.write(&mut self.position, host.position)?;
        backend.write(&mut self.block_position, host.block_position)?;
        backend.write(&mut self.target_rows, host.target_rows)?;
        backend.write(&mut self.target_ids, host.target_ids)?;
        backend.write(&mut self.cache_rows, host.cache_rows)?;
        Ok(())
    }
}
