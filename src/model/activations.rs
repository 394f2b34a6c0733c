//! What the forward pass leaves for the backward pass, and the room that both share.

use super::batch::{Batch, BatchLimits};
use super::linear::LinearScratch;
use crate::adapter::lora::LoraScratch;
use crate::backend::{Backend, BackendError};
use crate::config::run::Recompute;

/// Sizes that decide how much room activations take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActivationShape {
    /// Largest micro-batch.
    pub limits: BatchLimits,
    /// H.
    pub hidden_size: usize,
    /// F.
    pub inner_hidden_size: usize,
    /// Outputs of the MLP's first layer: F, or 2 F with a gate.
    pub mlp_width: usize,
    /// N.
    pub heads: usize,
    /// N D.
    pub query_width: usize,
    /// Whether queries, keys and values come out of layers of their own.
    pub splits_qkv: bool,
    /// P; 0 without a prefix.
    pub prefix_len: usize,
    /// 2 G D.
    pub key_value_width: usize,
    /// r; 0 without LoRA.
    pub lora_rank: usize,
    /// Whether LoRA has dropout, which needs room for a copy of its input.
    pub lora_dropout: bool,
    /// Weights of the largest layer that is held as codes; 0 for none.
    pub dequantised: usize,
}

/// What attention leaves: the dear part, kept by `none` and `attention_free`.
pub struct AttentionActivations<B: Backend> {
    /// Queries, keys (both rotated) and values, `[T, (N + 2 G) D]`.
    pub qkv: B::Buffer<B::Element>,
    /// Attention's output before the dense layer, `[T, N D]`.
    pub context: B::Buffer<B::Element>,
    /// Log of the sum of exponentials, `[T, N]`.
    pub lse: B::Buffer<f32>,
    /// Residual and attention's branch, the input of the second norm, `[T, H]`.
    pub sum: B::Buffer<f32>,
}

impl<B: Backend> AttentionActivations<B> {
    fn new(backend: &B, shape: ActivationShape) -> Result<Self, BackendError> {
        let (rows, hidden) = (shape.limits.rows, shape.hidden_size);
        Ok(AttentionActivations {
            qkv: backend.zeros(rows * (shape.query_width + shape.key_value_width))?,
            context: backend.zeros(rows * shape.query_width)?,
            lse: backend.zeros(rows * shape.heads)?,
            sum: backend.zeros(rows * hidden)?,
        })
    }
}

/// What norms and MLP leave: cheap to compute again, kept by `none` alone.
pub struct DenseActivations<B: Backend> {
    /// First norm's output, `[T, H]`.
    pub norm1: B::Buffer<B::Element>,
    /// `[2, T]`.
    pub norm1_stats: B::Buffer<f32>,
    /// Second norm's output, `[T, H]`.
    pub norm2: B::Buffer<B::Element>,
    /// `[2, T]`.
    pub norm2_stats: B::Buffer<f32>,
    /// Input of the activation, `[T, F]`, or `[T, 2 F]` with a gate.
    pub inner: B::Buffer<B::Element>,
    /// Its output, `[T, F]`.
    pub activated: B::Buffer<B::Element>,
}

impl<B: Backend> DenseActivations<B> {
    fn new(backend: &B, shape: ActivationShape) -> Result<Self, BackendError> {
        let (rows, hidden) = (shape.limits.rows, shape.hidden_size);
        Ok(DenseActivations {
            norm1: backend.zeros(rows * hidden)?,
            norm1_stats: backend.zeros(2 * rows)?,
            norm2: backend.zeros(rows * hidden)?,
            norm2_stats: backend.zeros(2 * rows)?,
            inner: backend.zeros(rows * shape.mlp_width)?,
            activated: backend.zeros(rows * shape.inner_hidden_size)?,
        })
    }
}

/// One micro-batch in flight on a stage.
pub struct Slot<B: Backend> {
    /// The micro-batch.
    pub batch: Batch<B>,
    /// Input of each block, `[T, H]`, f32.
    pub inputs: Vec<B::Buffer<f32>>,
    /// What attention left, for each block; empty where it is recomputed.
    pub attention: Vec<AttentionActivations<B>>,
    /// What norms and MLP left, for each block; empty where they are recomputed.
    pub dense: Vec<DenseActivations<B>>,
    /// On the last stage: gradient of the loss with respect to the last block's output, `[T, H]`.
    pub loss_gradient: Option<B::Buffer<B::Element>>,
    /// On the last stage: loss of each row with a target, `[R]`.
    pub token_loss: Option<B::Buffer<f32>>,
}

impl<B: Backend> Slot<B> {
    /// Room for one micro-batch in flight through `blocks` blocks, the one in `slot`.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        backend: &B,
        shape: ActivationShape,
        slot: usize,
        blocks: usize,
        head: bool,
        recompute: Recompute,
    ) -> Result<Self, BackendError> {
        let (rows, hidden) = (shape.limits.rows, shape.hidden_size);
        let count = |kept: bool| if kept { blocks } else { 0 };
        let attention = count(matches!(
            recompute,
            Recompute::None | Recompute::AttentionFree
        ));
        let dense = count(recompute == Recompute::None);
        Ok(Slot {
            batch: Batch::new(backend, shape.limits, slot)?,
            inputs: many(blocks, || backend.zeros(rows * hidden))?,
            attention: many(attention, || AttentionActivations::new(backend, shape))?,
            dense: many(dense, || DenseActivations::new(backend, shape))?,
            loss_gradient: match head {
                true => Some(backend.zeros(rows * hidden)?),
                false => None,
            },
            token_loss: match head {
                true => Some(backend.zeros(rows)?),
                false => None,
            },
        })
    }
}

fn many<T>(
    count: usize,
    mut make: impl FnMut() -> Result<T, BackendError>,
) -> Result<Vec<T>, BackendError> {
    (0..count).map(|_| make()).collect()
}

/// Room that one block at a time uses.
pub struct Scratch<B: Backend> {
    /// Output of a branch before the residual sum, or gradient of a norm's output, `[T, H]`.
    pub branch: B::Buffer<B::Element>,
    /// Gradient of `context`, `[T, N D]`.
    pub dcontext: B::Buffer<B::Element>,
    /// Gradient of `sum`, `[T, H]`.
    pub dsum: B::Buffer<B::Element>,
    /// Gradient of `qkv`, `[T, (N + 2 G) D]`.
    pub dqkv: B::Buffer<B::Element>,
    /// Queries, keys or values alone, or their gradient, `[T, N D]`; nothing where one layer makes all.
    pub part: B::Buffer<B::Element>,
    /// Gradient of `activated`, `[T, F]`; GELU's turns into that of `inner` in place.
    pub dactivated: B::Buffer<B::Element>,
    /// Gradient of `inner` with a gate, `[T, 2 F]`; else nothing.
    pub dinner: B::Buffer<B::Element>,
    /// Prefix with dropout, one per sequence, `[S, P, 2, G, D]`.
    pub prefix: B::Buffer<B::Element>,
    /// Its gradient.
    pub dprefix: B::Buffer<f32>,
    /// Room of the linear layers.
    pub linear: LinearScratch<B>,
}

/// Room of a stage that is not bound to a micro-batch.
pub struct Workspace<B: Backend> {
    /// Output of the last block of the stage, `[T, H]`, f32; consumed at once.
    pub output: B::Buffer<f32>,
    /// Gradient that comes into a block, `[T, H]`.
    pub dout: B::Buffer<B::Element>,
    /// Gradient that leaves it, `[T, H]`.
    pub dx: B::Buffer<B::Element>,
    /// Where attention leaves what no slot keeps.
    pub attention: AttentionActivations<B>,
    /// Where norms and MLP leave what no slot keeps.
    pub dense: DenseActivations<B>,
    /// Room inside a block.
    pub scratch: Scratch<B>,
}

impl<B: Backend> Workspace<B> {
    /// Room for the largest micro-batch; `lora_slots`: how many are in flight through each LoRA.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        backend: &B,
        shape: ActivationShape,
        lora_slots: &[usize],
    ) -> Result<Self, BackendError> {
        let (rows, hidden) = (shape.limits.rows, shape.hidden_size);
        let inner = shape.inner_hidden_size;
        let prefix = shape.limits.sequences * shape.prefix_len * shape.key_value_width;
        let queries = shape.query_width;
        let widest = hidden.max(inner).max(queries);
        let widest = shape.lora_dropout.then_some(widest);
        let gated = if shape.mlp_width > inner {
            shape.mlp_width
        } else {
            0
        };
        let part = if shape.splits_qkv { queries } else { 0 };
        Ok(Workspace {
            output: backend.zeros(rows * hidden)?,
            dout: backend.zeros(rows * hidden)?,
            dx: backend.zeros(rows * hidden)?,
            attention: AttentionActivations::new(backend, shape)?,
            dense: DenseActivations::new(backend, shape)?,
            scratch: Scratch {
                branch: backend.zeros(rows * hidden)?,
                dcontext: backend.zeros(rows * queries)?,
                dsum: backend.zeros(rows * hidden)?,
                dqkv: backend.zeros(rows * (queries + shape.key_value_width))?,
                part: backend.zeros(rows * part)?,
                dactivated: backend.zeros(rows * inner)?,
                dinner: backend.zeros(rows * gated)?,
                prefix: backend.zeros(prefix)?,
                dprefix: backend.zeros(prefix)?,
                linear: LinearScratch {
                    weight: backend.zeros(shape.dequantised)?,
                    lora: LoraScratch::new(backend, rows, shape.lora_rank, lora_slots, widest)?,
                },
            },
        })
    }
}
