//! The layers that make queries, keys and values: one for all, or one for each.

use super::batch::Batch;
use super::linear::{Linear, LinearScratch};
use crate::adapter::Parameter;
use crate::backend::{Backend, BackendError};

/// Queries, keys and values of a block, in one row of `(N + 2 G) D` columns per token.
pub enum QueryKeyValue<B: Backend> {
    /// `[(N + 2 G) D, H]`.
    Fused(Box<Linear<B>>),
    /// `[N D, H]`, `[G D, H]`, `[G D, H]`, whose outputs stand side by side.
    Split(Box<[Linear<B>; 3]>),
}

/// Room beside the row that all of them fill.
pub struct QkvScratch<'a, B: Backend> {
    /// Output of one layer, or its gradient, `[T, N D]`.
    pub part: &'a mut B::Buffer<B::Element>,
    /// Room of the linear layers.
    pub linear: &'a mut LinearScratch<B>,
}

impl<B: Backend> QueryKeyValue<B> {
    /// Fills `qkv` from `x [T, H]`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &self,
        backend: &B,
        qkv: &mut B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        scratch: QkvScratch<'_, B>,
    ) -> Result<(), BackendError> {
        let QkvScratch { part, linear } = scratch;
        let layers = match self {
            QueryKeyValue::Fused(layer) => return layer.forward(backend, qkv, x, batch, linear),
            QueryKeyValue::Split(layers) => layers,
        };
        let width = total_width(layers);
        let mut first = 0;
        for layer in layers.iter() {
            layer.forward(backend, part, x, batch, linear)?;
            backend.put_columns(qkv, part, batch.rows, width, first, layer.out_features)?;
            first += layer.out_features;
        }
        Ok(())
    }

    /// The mirror of [`QueryKeyValue::forward`]: gradients of what is trained, and `dx` where wanted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(
        &mut self,
        backend: &B,
        mut dx: Option<&mut B::Buffer<B::Element>>,
        dqkv: &B::Buffer<B::Element>,
        x: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        scratch: QkvScratch<'_, B>,
    ) -> Result<(), BackendError> {
        let QkvScratch { part, linear } = scratch;
        let layers = match self {
            QueryKeyValue::Fused(layer) => {
                return layer.backward(backend, dx, dqkv, x, batch, linear, false);
            }
            QueryKeyValue::Split(layers) => layers,
        };
        let width = total_width(layers);
        let mut first = 0;
        for (index, layer) in layers.iter_mut().enumerate() {
            let cols = layer.out_features;
            backend.take_columns(part, dqkv, batch.rows, width, first, cols)?;
            let dx = dx.as_deref_mut();
            layer.backward(backend, dx, part, x, batch, linear, index > 0)?;
            first += cols;
        }
        Ok(())
    }

    /// The layers.
    pub fn layers_mut(&mut self) -> &mut [Linear<B>] {
        match self {
            QueryKeyValue::Fused(layer) => std::slice::from_mut(layer),
            QueryKeyValue::Split(layers) => layers.as_mut_slice(),
        }
    }

    /// Whether anything of them is trained.
    pub fn is_trained(&self) -> bool {
        match self {
            QueryKeyValue::Fused(layer) => layer.is_trained(),
            QueryKeyValue::Split(layers) => layers.iter().any(Linear::is_trained),
        }
    }

    /// What is trained here.
    pub fn parameters(&mut self) -> Vec<&mut Parameter<B>> {
        match self {
            QueryKeyValue::Fused(layer) => layer.parameters().collect(),
            QueryKeyValue::Split(layers) => {
                layers.iter_mut().flat_map(Linear::parameters).collect()
            }
        }
    }
}

fn total_width<B: Backend>(layers: &[Linear<B>; 3]) -> usize {
    layers.iter().map(|layer| layer.out_features).sum()
}
