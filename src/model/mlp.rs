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
        let (layer, x) = (&self.dense_h_to_4h, &acts.norm2);
        match self.activation {
            Activation::Gelu => layer.forward_gelu(backend, activated, inner, x, batch, scratch),
            Activation::SwiGlu => {
                layer.forward(backend, inner, x, batch, scratch)?;
                let width = self.dense_4h_to_h.in_features;
                backend.swiglu(activated, inner, batch.rows, width)
            }
        }
    }

    /// The mirror of `dense_4h_to_h(activation(inner))`: gradients of what is trained in the layer, and the
    /// gradient of `inner` where wanted, which ends up in one of the two rooms: `dinner` is needed for
    /// SwiGLU alone.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn narrow_backward<'a>(
        &mut self,
        backend: &B,
        [dinner, dactivated]: [&'a mut B::Buffer<B::Element>; 2],
        wanted: bool,
        dout: &B::Buffer<B::Element>,
        acts: &DenseActivations<B>,
        batch: &Batch<B>,
        scratch: &mut LinearScratch<B>,
    ) -> Result<&'a B::Buffer<B::Element>, BackendError> {
        let (layer, activated, inner) = (&mut self.dense_4h_to_h, &acts.activated, &acts.inner);
        let room = wanted.then_some(&mut *dactivated);
        match self.activation {
            Activation::Gelu => {
                layer.backward_gelu(backend, room, dout, activated, inner, batch, scratch)?;
                Ok(dactivated)
            }
            Activation::SwiGlu => {
                layer.backward(backend, room, dout, activated, batch, scratch, false)?;
                if wanted {
                    let width = layer.in_features;
                    backend.swiglu_backward(dinner, dactivated, inner, batch.rows, width)?;
                }
                Ok(dinner)
            }
        }
    }
}
