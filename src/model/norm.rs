//! A layer norm with weight and bias.

use super::linear::Weight;
use crate::adapter::Parameter;
use crate::backend::{Backend, BackendError, NormShape, RowGradient};

/// `(x - mean) * rstd * weight + bias`.
pub struct LayerNorm<B: Backend> {
    /// `[H]`.
    pub weight: Weight<B>,
    /// `[H]`.
    pub bias: Weight<B>,
    /// H.
    pub hidden_size: usize,
    /// Added to the variance.
    pub eps: f32,
}

impl<B: Backend> LayerNorm<B> {
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

    /// `out [T, H]` and `stats [2, T]` from the f32 sum `x [T, H]`.
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
        let (weight, bias) = (self.weight.values(), self.bias.values());
        backend.layer_norm(out, stats, x, weight, bias, self.shape(rows))
    }

    /// The mirror of [`LayerNorm::forward`]: gradients of weight and bias where trained, and `dx`
    /// where wanted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(
        &mut self,
        backend: &B,
        dx: Option<&mut B::Buffer<B::Element>>,
        dout: RowGradient<'_, B>,
        x: &B::Buffer<f32>,
        stats: &B::Buffer<f32>,
        rows: usize,
    ) -> Result<(), BackendError> {
        let shape = self.shape(rows);
        if let (Some(dweight), Some(dbias)) = (self.weight.accumulate(), self.bias.accumulate()) {
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
        [self.weight.parameter(), self.bias.parameter()]
            .into_iter()
            .flatten()
    }
}
