//! Low-rank adaptation of one linear layer (Hu et al. 2021): `out += scale * B(A(dropout(x)))`.

use super::{Parameter, Role};
use crate::backend::{Backend, BackendError, Dropout, LinearShape, Span, Sums};

/// `lora_A` and `lora_B` of one linear layer.
pub struct Lora<B: Backend> {
    /// `[r, I]`.
    pub a: Parameter<B>,
    /// `[O, r]`.
    pub b: Parameter<B>,
    rank: usize,
    scale: f32,
    /// Where its part of [`LoraScratch`] is.
    place: usize,
}

/// What the LoRAs of a stage leave for the backward pass, and room for one of them at a time.
pub struct LoraScratch<B: Backend> {
    /// A(dropout(x)) of each LoRA, for each micro-batch in flight through it, `[T, r]`: beside the inputs of
    /// the blocks next to nothing, and to compute it again x would have to be read again.
    low: Vec<Vec<B::Buffer<B::Element>>>,
    /// Its gradient, `[T, r]`.
    dlow: B::Buffer<B::Element>,
    /// dropout(x) and its gradient, `[T, I]` each; nothing without dropout.
    wide: Option<[B::Buffer<B::Element>; 2]>,
}

impl<B: Backend> LoraScratch<B> {
    /// Room for `rows` tokens, rank `rank`, `slots[i]` micro-batches in flight through the LoRA whose place
    /// is i, and inputs of at most `widest` columns where there is dropout.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        backend: &B,
        rows: usize,
        rank: usize,
        slots: &[usize],
        widest: Option<usize>,
    ) -> Result<Self, BackendError> {
        let low = |&slots: &usize| (0..slots).map(|_| backend.zeros(rows * rank)).collect();
        Ok(LoraScratch {
            low: slots.iter().map(low).collect::<Result<_, _>>()?,
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
            place: 0,
        }
    }

    /// Which of the LoRAs of its stage this is.
    pub fn set_place(&mut self, place: usize) {
        self.place = place;
    }

    fn down(&self, shape: LinearShape) -> LinearShape {
        LinearShape {
            out_features: self.rank,
            sums: Sums::F32,
            ..shape
        }
    }

    fn up(&self, shape: LinearShape) -> LinearShape {
        LinearShape {
            in_features: self.rank,
            sums: Sums::F32,
            ..shape
        }
    }

    /// `out = scale * B(A(dropout(x)))`, for a layer of the given shape; A(dropout(x)) is kept for the
    /// micro-batch in `slot`.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        backend: &B,
        out: &mut B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        shape: LinearShape,
        slot: usize,
        scratch: &mut LoraScratch<B>,
        noise: Option<LoraNoise<'_>>,
    ) -> Result<(), BackendError> {
        let LoraScratch { low, wide, .. } = scratch;
        let low = &mut low[self.place][slot];
        let x = dropped(backend, wide, x, shape, noise)?;
        let (a, b) = (self.a.working(), self.b.working());
        backend.linear(low, x, a, None, self.down(shape), 1.0, false)?;
        backend.linear(out, low, b, None, self.up(shape), self.scale, false)
    }

    /// Adds to the gradients of A and B, and leaves the gradient of A(dropout(x)) in the scratch.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn gradients(
        &mut self,
        backend: &B,
        dout: &B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        shape: LinearShape,
        slot: usize,
        scratch: &mut LoraScratch<B>,
        noise: Option<LoraNoise<'_>>,
    ) -> Result<(), BackendError> {
        let (up, down) = (self.up(shape), self.down(shape));
        let LoraScratch { low, dlow, wide } = scratch;
        let (b, db) = self.b.working_and_gradient();
        let low = &low[self.place][slot];
        backend.low_rank_backward(dlow, db, dout, low, b, up, self.scale)?;
        let x = dropped(backend, wide, x, shape, noise)?;
        backend.weight_gradient(self.a.accumulate(), dlow, x, down, 1.0)
    }

    /// The gradient of x behind [`Lora::gradients`] without dropout, added to what `dx` holds when
    /// `accumulate`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(
        &self,
        backend: &B,
        dx: &mut B::Buffer<B::Element>,
        shape: LinearShape,
        scratch: &LoraScratch<B>,
        accumulate: bool,
    ) -> Result<(), BackendError> {
        let (a, down) = (self.a.working(), self.down(shape));
        backend.linear_backward(dx, &scratch.dlow, a, down, 1.0, accumulate)
    }

    /// Adds the gradient of x behind [`Lora::gradients`] with dropout.
    ///
    /// # Errors
    /// When the device fails.
    pub fn dropped_backward(
        &self,
        backend: &B,
        dx: &mut B::Buffer<B::Element>,
        shape: LinearShape,
        scratch: &mut LoraScratch<B>,
        noise: LoraNoise<'_>,
    ) -> Result<(), BackendError> {
        let LoraScratch { dlow, wide, .. } = scratch;
        let Some([_, ddropped]) = wide else {
            return Ok(());
        };
        let (a, down) = (self.a.working(), self.down(shape));
        backend.linear_backward(ddropped, dlow, a, down, 1.0, false)?;
        let LoraNoise { dropout, spans } = noise;
        backend.dropout_backward(dx, ddropped, dropout, spans, shape.in_features)
    }
}

/// dropout(x), in the scratch, or x where there is none.
fn dropped<'a, B: Backend>(
    backend: &B,
    wide: &'a mut Option<[B::Buffer<B::Element>; 2]>,
    x: &'a B::Buffer<B::Element>,
    shape: LinearShape,
    noise: Option<LoraNoise<'_>>,
) -> Result<&'a B::Buffer<B::Element>, BackendError> {
    match (noise, wide) {
        (Some(LoraNoise { dropout, spans }), Some([dropped, _])) => {
            backend.dropout(dropped, x, dropout, spans, shape.in_features)?;
            Ok(dropped)
        }
        _ => Ok(x),
    }
}
