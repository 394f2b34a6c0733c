//! Low-rank adaptation of one linear layer (Hu et al. 2021): `out += scale * B(A(dropout(x)))`.

use super::{Parameter, Role};
use crate::backend::{Backend, BackendError, Dropout, LinearShape, Span};

/// `lora_A` and `lora_B` of one linear layer.
pub struct Lora<B: Backend> {
    /// `[r, I]`.
    pub a: Parameter<B>,
    /// `[O, r]`.
    pub b: Parameter<B>,
    rank: usize,
    scale: f32,
}

/// Room for the low-rank activations of one layer at a time, shared by all layers of a stage.
pub struct LoraScratch<B: Backend> {
    /// A(x), `[T, r]`.
    low: B::Buffer<B::Element>,
    /// Its gradient, `[T, r]`.
    dlow: B::Buffer<B::Element>,
    /// dropout(x) and its gradient, `[T, I]` each; nothing without dropout.
    wide: Option<[B::Buffer<B::Element>; 2]>,
}

impl<B: Backend> LoraScratch<B> {
    /// Room for `rows` tokens, rank `rank` and inputs of at most `widest` columns.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        backend: &B,
        rows: usize,
        rank: usize,
        widest: Option<usize>,
    ) -> Result<Self, BackendError> {
        Ok(LoraScratch {
            low: backend.zeros(rows * rank)?,
            dlow: backend.zeros(rows * rank)?,
            wide: match widest {
                Some(widest) => {
                    Some([backend.zeros(rows * widest)?, backend.zeros(rows * widest)?])
                }
                None => None,
            },
        })
    }
}

/// The dropout of one layer in one micro-batch, and the sequences its mask is keyed by.
#[derive(Clone, Copy)]
pub struct LoraNoise<'a> {
    /// Probability and key.
    pub dropout: Dropout,
    /// Sequences of the micro-batch.
    pub spans: &'a [Span],
}

impl<B: Backend> Lora<B> {
    /// Puts the two matrices together; `lora_alpha / r` is the scale.
    pub fn new(a: Parameter<B>, b: Parameter<B>, rank: usize, lora_alpha: f32) -> Self {
        debug_assert!(a.spec().role == Role::LoraA && b.spec().role == Role::LoraB);
        Lora {
            a,
            b,
            rank,
            scale: lora_alpha / rank as f32,
        }
    }

    fn down(&self, shape: LinearShape) -> LinearShape {
        LinearShape {
            out_features: self.rank,
            ..shape
        }
    }

    fn up(&self, shape: LinearShape) -> LinearShape {
        LinearShape {
            in_features: self.rank,
            ..shape
        }
    }

    /// `out += scale * B(A(dropout(x)))`, for a layer of the given shape.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &self,
        backend: &B,
        out: &mut B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        shape: LinearShape,
        scratch: &mut LoraScratch<B>,
        noise: Option<LoraNoise<'_>>,
    ) -> Result<(), BackendError> {
        self.low(backend, x, shape, scratch, noise)?;
        let b = self.b.working();
        backend.linear(out, &scratch.low, b, None, self.up(shape), self.scale, true)
    }

    /// A(dropout(x)) into the scratch; what dropout left stays there too.
    fn low(
        &self,
        backend: &B,
        x: &B::Buffer<B::Element>,
        shape: LinearShape,
        scratch: &mut LoraScratch<B>,
        noise: Option<LoraNoise<'_>>,
    ) -> Result<(), BackendError> {
        let LoraScratch { low, wide, .. } = scratch;
        let x = match (noise, wide) {
            (Some(noise), Some([dropped, _])) => {
                backend.dropout(dropped, x, noise.dropout, noise.spans, shape.in_features)?;
                &*dropped
            }
            _ => x,
        };
        backend.linear(low, x, self.a.working(), None, self.down(shape), 1.0, false)
    }

    /// The mirror of [`Lora::forward`]: adds to the gradients of A and B, and to `dx` where wanted.
    /// A(dropout(x)) is computed a second time, which costs less than keeping it.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        backend: &B,
        dx: Option<&mut B::Buffer<B::Element>>,
        dout: &B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        shape: LinearShape,
        scratch: &mut LoraScratch<B>,
        noise: Option<LoraNoise<'_>>,
    ) -> Result<(), BackendError> {
        self.low(backend, x, shape, scratch, noise)?;
        let (up, down) = (self.up(shape), self.down(shape));
        let LoraScratch { low, dlow, wide } = scratch;
        backend.weight_gradient(self.b.accumulate(), dout, low, up, self.scale)?;
        backend.linear_backward(dlow, dout, self.b.working(), up, self.scale, false)?;
        match (noise, wide) {
            (Some(noise), Some([dropped, ddropped])) => {
                backend.weight_gradient(self.a.accumulate(), dlow, dropped, down, 1.0)?;
                if let Some(dx) = dx {
                    backend.linear_backward(ddropped, dlow, self.a.working(), down, 1.0, false)?;
                    let cols = shape.in_features;
                    backend.dropout_backward(dx, ddropped, noise.dropout, noise.spans, cols)?;
                }
            }
            _ => {
                backend.weight_gradient(self.a.accumulate(), dlow, x, down, 1.0)?;
                if let Some(dx) = dx {
                    backend.linear_backward(dx, dlow, self.a.working(), down, 1.0, true)?;
                }
            }
        }
        Ok(())
    }
}
