//! The MLP half of a block: `dense_4h_to_h(gelu(dense_h_to_4h(x)))`, not gated.

use super::activations::DenseActivations;
use super::batch::Batch;
use super::linear::{Linear, LinearScratch};
use crate::backend::{Backend, BackendError};

/// The two linear layers around GELU.
pub struct Mlp<B: Backend> {
    /// `[F, H]`.
    pub dense_h_to_4h: Linear<B>,
    /// `[H, F]`.
    pub dense_4h_to_h: Linear<B>,
}

impl<B: Backend> Mlp<B> {
    /// Fills `inner` and `gelu` from `norm2`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn widen(
        &self,
        backend: &B,
        acts: &mut DenseActivations<B>,
        batch: &Batch<B>,
        scratch: &mut LinearScratch<B>,
    ) -> Result<(), BackendError> {
        let layer = &self.dense_h_to_4h;
        layer.forward(backend, &mut acts.inner, &acts.norm2, batch, scratch)?;
        let len = batch.rows * layer.out_features;
        backend.gelu(&mut acts.gelu, &acts.inner, len)
    }
}
