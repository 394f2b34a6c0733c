//! The norms of a model: layer norm with weight and bias, or RMS norm with a weight.

use super::linear::Weight;
use crate::adapter::Parameter;
use crate::backend::{Backend, BackendError, NormShape, RowGradient};

/// Factor on the residual of ChatGLM-6B, sqrt(2 * 28). In the original the block has a layer count of its
/// own that defaults to 28 and is never set from the configuration, so it does not follow the model's depth.
pub const RESIDUAL_ALPHA: f32 = 7.483_315;

/// A norm, and the residual that goes around what stands behind it.
pub struct Norm<B: Backend> {
    /// `[H]`.
    pub weight: Weight<B>,
    /// `[H]` of a layer norm, `(x - mean) * rstd * weight + bias`; an RMS norm, `x * rstd * weight`, has
    /// none.
    pub bias: Option<Weight<B>>,
    /// H.
    pub hidden_size: usize,
    /// Added to the variance, or to the mean square.
    pub eps: f32,
}

impl<B: Backend> Norm<B> {
    fn shape(&self, rows: usize) -> NormShape {
        NormShape {
            rows,
            cols: self.hidden_size,
            eps: self.eps,
        }
    }

    /// Whether it is trained.
    pub fn is_trained(&self) -> bool {
        matches!(self.weight, Weight::Trained(_))
    }

    /// `out [T, H]` and `stats [2, T]` (of an RMS norm the first half) from the f32 sum `x [T, H]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &self,
        backend: &B,
        out: &mut B::Buffer<B::Element>,
        stats: &mut B::Buffer<f32>,
        x: &B::Buffer<f32>,
        rows: usize,
    ) -> Result<(), BackendError> {
        let (weight, shape) = (self.weight.values(), self.shape(rows));
        match &self.bias {
            Some(bias) => backend.layer_norm(out, stats, x, weight, bias.values(), shape),
            None => backend.rms_norm(out, stats, x, weight, shape),
        }
    }

    /// What the branch behind the norm is added to, and the sum, `out [T, H]`: `alpha` times the norm's
    /// output `normed` behind a layer norm, the norm's input `x` behind an RMS norm.
    ///
    /// # Errors
    /// When the device fails.
    pub fn residual(
        &self,
        backend: &B,
        out: &mut B::Buffer<f32>,
        x: &B::Buffer<f32>,
        normed: &B::Buffer<B::Element>,
        branch: &B::Buffer<B::Element>,
        rows: usize,
    ) -> Result<(), BackendError> {
        let len = rows * self.hidden_size;
        match self.bias {
            Some(_) => backend.residual(out, normed, RESIDUAL_ALPHA, branch, len),
            None => backend.residual_sum(out, x, branch, len),
        }
    }

    /// [`Norm::residual`] into `sum [T, H]` and what the norm behind it, `next`, makes of that, in one pass.
    /// Both are of one kind, as all norms of a model are.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn residual_and_norm(
        &self,
        backend: &B,
        next: &Norm<B>,
        (out, stats): (&mut B::Buffer<B::Element>, &mut B::Buffer<f32>),
        sum: &mut B::Buffer<f32>,
        x: &B::Buffer<f32>,
        normed: &B::Buffer<B::Element>,
        branch: &B::Buffer<B::Element>,
        rows: usize,
    ) -> Result<(), BackendError> {
        let (weight, shape) = (next.weight.values(), next.shape(rows));
        match &next.bias {
            Some(bias) => {
                let (alpha, bias) = (RESIDUAL_ALPHA, bias.values());
                backend.residual_layer_norm(
                    out, stats, sum, normed, alpha, branch, weight, bias, shape,
                )
            }
            None => backend.residual_rms_norm(out, stats, sum, x, branch, weight, shape),
        }
    }

    /// The mirror of [`Norm::forward`] and [`Norm::residual`]: gradients of weight and bias where trained,
    /// and `dx` where wanted, from the gradient of the norm's output, `dout`, and that of the residual sum.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        backend: &B,
        dx: Option<&mut B::Buffer<B::Element>>,
        dout: &B::Buffer<B::Element>,
        dsum: Option<&B::Buffer<B::Element>>,
        x: &B::Buffer<f32>,
        stats: &B::Buffer<f32>,
        rows: usize,
    ) -> Result<(), BackendError> {
        let shape = self.shape(rows);
        let Some(bias) = &mut self.bias else {
            if let Some(dweight) = self.weight.accumulate() {
                backend.rms_norm_weight_gradient(dweight, dout, x, stats, shape)?;
            }
            let weight = self.weight.values();
            return match dx {
                Some(dx) => backend.rms_norm_backward(dx, dout, dsum, x, stats, weight, shape),
                None => Ok(()),
            };
        };
        let dout = RowGradient {
            dout,
            residual: dsum.map(|dsum| (dsum, RESIDUAL_ALPHA)),
        };
        if let (Some(dweight), Some(dbias)) = (self.weight.accumulate(), bias.accumulate()) {
            backend.layer_norm_weight_gradient(dweight, dbias, dout, x, stats, shape)?;
        }
        match dx {
            Some(dx) => {
                backend.layer_norm_backward(dx, dout, x, stats, self.weight.values(), shape)
            }
            None => Ok(()),
        }
    }

    /// What is trained here.
    pub fn parameters(&mut self) -> impl Iterator<Item = &mut Parameter<B>> {
        let bias = self.bias.as_mut().and_then(Weight::parameter);
        [self.weight.parameter(), bias].into_iter().flatten()
    }
}
