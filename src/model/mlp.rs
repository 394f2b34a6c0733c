//! The MLP half of a block: `dense_4h_to_h(activation(dense_h_to_4h(x)))`.

use super::activations::DenseActivations;
use super::batch::Batch;
use super::linear::{Linear, LinearScratch};
use crate::backend::{Backend, BackendError};
use crate::config::architecture::Activation;

/// The two linear layers around the activation.
pub struct Mlp<B: Backend> {
    /// `[F, H]`, or `[2 F, H]` with a gate.
    pub dense_h_to_4h: Linear<B>,
    /// `[H, F]`.
    pub dense_4h_to_h: Linear<B>,
    /// Between them.
    pub activation: Activation,
}

impl<B: Backend> Mlp<B> {
    /// Fills `inner` and `activated` from `norm2`.
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
        let (inner, activated) = (&mut acts.inner, &mut acts.activated);
        let layer = &self.dense_h_to_4h;
        layer.forward(backend, inner, &acts.norm2, batch, scratch)?;
        let (rows, width) = (batch.rows, self.dense_4h_to_h.in_features);
        match self.activation {
            Activation::Gelu => backend.gelu(activated, inner, rows * width),
            Activation::SwiGlu => backend.swiglu(activated, inner, rows, width),
        }
    }

    /// The mirror of the activation: the gradient of `inner` from that of `activated`, in either of the two
    /// rooms. That of GELU takes the place of what it came from, `dinner` is needed for SwiGLU alone.
    ///
    /// # Errors
    /// When the device fails.
    pub fn activation_backward<'a>(
        &self,
        backend: &B,
        dinner: &'a mut B::Buffer<B::Element>,
        dactivated: &'a mut B::Buffer<B::Element>,
        inner: &B::Buffer<B::Element>,
        rows: usize,
    ) -> Result<&'a B::Buffer<B::Element>, BackendError> {
        let width = self.dense_4h_to_h.in_features;
        match self.activation {
            Activation::Gelu => {
                backend.gelu_backward(dactivated, inner, rows * width)?;
                Ok(dactivated)
            }
            Activation::SwiGlu => {
                backend.swiglu_backward(dinner, dactivated, inner, rows, width)?;
                Ok(dinner)
            }
        }
    }
}
