//! The word embedding, and lm_head where it is the same matrix.

use super::linear::Weight;
use crate::backend::{Backend, BackendError};

/// `[V, H]`, on the first stage.
pub struct Embedding<B: Backend> {
    /// The matrix.
    pub weight: Weight<B>,
    /// H.
    pub hidden_size: usize,
}

impl<B: Backend> Embedding<B> {
    /// `out [T, H] = weight[ids]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &self,
        backend: &B,
        out: &mut B::Buffer<f32>,
        ids: &B::Buffer<u32>,
        rows: usize,
    ) -> Result<(), BackendError> {
        backend.embed(out, self.weight.values(), ids, rows, self.hidden_size)
    }

    /// Adds to the gradient of the matrix where it is trained.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(
        &mut self,
        backend: &B,
        dout: &B::Buffer<B::Element>,
        ids: &B::Buffer<u32>,
        rows: usize,
    ) -> Result<(), BackendError> {
        match self.weight.accumulate() {
            Some(dweight) => backend.embed_backward(dweight, dout, ids, rows, self.hidden_size),
            None => Ok(()),
        }
    }
}
