//! The small argument types of the ops.

use super::Backend;
use crate::random::Key;

/// What the sums of a product of halves are kept in on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sums {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16 where the device gains by it: GPUs, in products large enough for their library. The
    /// sum is rounded every few terms, and may overflow on its way. Products of f32 know no such thing,
    /// nor do gradients of weights, nor the CPU.
    F16,
}

/// `[rows, in_features] -> [rows, out_features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// T, rows of the input and the output.
    pub rows: usize,
    /// I, columns of the input and of the weight.
    pub in_features: usize,
    /// O, columns of the output and rows of the weight.
    pub out_features: usize,
    /// How the terms of an output are added.
    pub sums: Sums,
}

/// Rows to be normed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormShape {
    /// T.
    pub rows: usize,
    /// H.
    pub cols: usize,
    /// Added to the variance.
    pub eps: f32,
}

/// The gradient of a norm's output where that output is used twice: `dout + alpha * residual`.
pub struct RowGradient<'a, B: Backend> {
    /// Gradient that came through the branch, `[T, H]`.
    pub dout: &'a B::Buffer<B::Element>,
    /// Gradient that came along the residual, `[T, H]`, and its factor.
    pub residual: Option<(&'a B::Buffer<B::Element>, f32)>,
}

impl<B: Backend> Clone for RowGradient<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for RowGradient<'_, B> {}

/// Which elements of a head a rotary embedding turns together, and by which angle.
///
/// A row of the tables holds the cosines (sines) of all angles of one position.
pub enum RotaryPositions<'a, B: Backend> {
    /// ChatGLM-6B: each head is cut in halves, the first turned by `position`, the second by
    /// `block_position`; inside a half of width D/2 element j is paired with j + D/4. Tables
    /// `[positions, D / 4]`.
    TwoDimensional {
        /// Row of the tables for the first half, `[T]`.
        position: &'a B::Buffer<u32>,
        /// Row of the tables for the second half, `[T]`.
        block_position: &'a B::Buffer<u32>,
    },
    /// ChatGLM2 and later: element 2j is paired with its neighbour 2j + 1 in the first `width` elements
    /// of a head; the others stay as they are. Tables `[positions, width / 2]`.
    Interleaved {
        /// Row of the tables, `[T]`.
        position: &'a B::Buffer<u32>,
        /// Elements that are turned: even, D at most.
        width: usize,
    },
}

impl<B: Backend> Clone for RotaryPositions<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for RotaryPositions<'_, B> {}

/// Where one kind of head (query, key or value) lies inside a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLayout {
    /// Elements from one row to the next.
    pub row: usize,
    /// Elements before head 0.
    pub offset: usize,
    /// Elements from one head to the next.
    pub stride: usize,
}

/// How heads lie in the rows that attention and rotary work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionLayout {
    /// N, query heads.
    pub heads: usize,
    /// G, key and value heads; N is a multiple of it.
    pub kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Query heads.
    pub query: HeadLayout,
    /// Key heads.
    pub key: HeadLayout,
    /// Value heads.
    pub value: HeadLayout,
}

impl AttentionLayout {
    /// ChatGLM-6B's `query_key_value`: for each head its query, key and value, `[T, N, 3, D]`.
    pub fn grouped_per_head(heads: usize, head_dim: usize) -> Self {
        let part = |index: usize| HeadLayout {
            row: 3 * heads * head_dim,
            offset: index * head_dim,
            stride: 3 * head_dim,
        };
        AttentionLayout {
            heads,
            kv_heads: heads,
            head_dim,
            query: part(0),
            key: part(1),
            value: part(2),
        }
    }

    /// ChatGLM2's `query_key_value` and those of later generations: all query heads, then all key
    /// heads, then all value heads, `[T, (N + 2 G) D]`.
    pub fn concatenated(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let part = |heads_before: usize| HeadLayout {
            row: (heads + 2 * kv_heads) * head_dim,
            offset: heads_before * head_dim,
            stride: head_dim,
        };
        AttentionLayout {
            heads,
            kv_heads,
            head_dim,
            query: part(0),
            key: part(heads),
            value: part(heads + kv_heads),
        }
    }

    /// The same queries over keys and values from a cache, `[rows, 2, G, D]`.
    pub fn with_cache(self) -> Self {
        let width = self.kv_heads * self.head_dim;
        let part = |index: usize| HeadLayout {
            row: 2 * width,
            offset: index * width,
            stride: self.head_dim,
        };
        AttentionLayout {
            key: part(0),
            value: part(1),
            ..self
        }
    }

    /// Elements of one row of keys and values, `2 G D`.
    pub fn key_value_width(&self) -> usize {
        2 * self.kv_heads * self.head_dim
    }
}

/// The rows of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First query row.
    pub q_start: usize,
    /// Number of queries; they are the last ones of the sequence.
    pub q_len: usize,
    /// First key row.
    pub kv_start: usize,
    /// Number of keys.
    pub kv_len: usize,
    /// Keys below this index are visible to every query.
    pub context_length: usize,
}

/// Keys and values that stand in front of every sequence's own and are visible to all its queries.
pub struct Prefix<'a, B: Backend> {
    /// `[P, 2, G, D]`, or `[S, P, 2, G, D]` with `per_sequence`.
    pub key_value: &'a B::Buffer<B::Element>,
    /// P.
    pub len: usize,
    /// Whether each sequence has a prefix of its own.
    pub per_sequence: bool,
}

impl<B: Backend> Clone for Prefix<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Prefix<'_, B> {}

/// Dropout with counter-based random numbers: the same key gives the same mask, in any order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability of a zero, `0 <= p < 1`.
    pub p: f32,
    /// Key of the random numbers of this step, micro-batch, layer and site; the sequence is folded in
    /// by the op.
    pub key: Key,
}

/// A tensor to be summed over, and the place of its sum among others.
pub struct SumOf<'a, B: Backend> {
    /// Place of the sum.
    pub index: usize,
    /// The values.
    pub x: &'a B::Buffer<f32>,
    /// How many of them.
    pub len: usize,
}

/// What an optimiser step changes of one trainable tensor, and what it reads.
pub struct AdamwTensor<'a, B: Backend> {
    /// Copy in the storage type.
    pub working: &'a mut B::Buffer<B::Element>,
    /// The f32 values.
    pub master: &'a mut B::Buffer<f32>,
    /// First moment.
    pub exp_avg: &'a mut B::Buffer<f32>,
    /// Second moment.
    pub exp_avg_sq: &'a mut B::Buffer<f32>,
    /// Gradient.
    pub gradient: &'a B::Buffer<f32>,
    /// Decoupled weight decay of this tensor.
    pub weight_decay: f32,
    /// Values of each of the five.
    pub len: usize,
}

/// One optimiser step, the same for all tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub learning_rate: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the square root of the corrected second moment.
    pub eps: f32,
    /// `1 - beta1^t`.
    pub bias_correction1: f32,
    /// `1 - beta2^t`.
    pub bias_correction2: f32,
    /// Factor on the gradient: clipping over loss scale.
    pub gradient_scale: f32,
}
