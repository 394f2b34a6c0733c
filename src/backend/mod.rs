//! The op vocabulary of the engine and its contracts; [`cpu`] is the readable reference.
//!
//! Conventions of every op: outputs come first; buffers hold contiguous rows and may be longer than
//! what the op touches; nothing but [`Backend::zeros`], [`Backend::upload`] and
//! [`Backend::upload_pieces`] allocates; sums are taken in f32 in an order that depends on the shape
//! alone, so that a result repeats bit for bit at every thread count; an element is rounded once, when
//! it is stored ([`Sums::F16`] is excepted). Every sequence has a query, and every shape a row.
//!
//! Letters: T rows (tokens) of a micro-batch, H hidden_size, F inner_hidden_size, N attention heads,
//! G key/value heads, D head_dim, V vocabulary, P prefix positions, S sequences, r LoRA rank.

pub mod cpu;
pub mod cuda;
mod element;
mod error;
mod left_behind;
mod memory;
mod pulse;
mod shapes;
mod work;

use crate::quant::Bits;
use crate::random::Key;
use half::f16;
use memory::piece_len;

pub use element::{Element, ElementsMut, Plain};
pub use error::BackendError;
pub use left_behind::{any_left_behind, leave_behind};
pub use memory::{MemoryUse, PIECE_BYTES};
pub use pulse::Pulse;
pub use shapes::{
    AdamwStep, AdamwTensor, AttentionLayout, Dropout, HeadLayout, LinearShape, NormShape, Prefix,
    RotaryPositions, RowGradient, Span, SumOf, Sums,
};
pub use work::{Counting, HostClock, Measured, Measuring, Work, WorkSeconds};

type Result<T> = std::result::Result<T, BackendError>;

/// A device that holds buffers and runs the ops of the engine on them.
///
/// `Element` is the storage type of weights and activations. Residual sums, statistics, gradients of
/// trainables and optimiser state are f32 whatever it is. A backend belongs to one worker thread.
#[allow(clippy::too_many_arguments)]
pub trait Backend: Measuring + Sized + 'static {
    /// Storage type of weights and activations.
    type Element: Element;
    /// Memory on the device.
    type Buffer<T: Plain>;

    /// Lets the worker's [`Pulse`] reach `place` when everything queued so far is done.
    fn mark(&self, place: u64) -> Result<()>;

    /// How the memory that was planned for a run is used; nothing where none is taken ahead.
    fn memory_use(&self) -> Option<MemoryUse> {
        None
    }

    /// A buffer of `len` zeros.
    fn zeros<T: Plain>(&self, len: usize) -> Result<Self::Buffer<T>>;

    /// A buffer with the values of `host`.
    fn upload<T: Plain>(&self, host: &[T]) -> Result<Self::Buffer<T>>;

    /// A buffer of `len` values that never stand in host memory together: `fill` gets where a piece
    /// begins and the room for its values, which it fills. Pieces come in any order, several at a time
    /// from several threads. A piece is a number of whole `unit`s, as is the buffer; it has
    /// [`PIECE_BYTES`] at most, or is one unit.
    ///
    /// # Errors
    /// Of the device, or of `fill` for the first piece that it fails for.
    fn upload_pieces<T: Plain, E: From<BackendError> + Send>(
        &self,
        len: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [T]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<Self::Buffer<T>, E>;

    /// Overwrites the first `host.len()` values of `out`.
    fn write<T: Plain>(&self, out: &mut Self::Buffer<T>, host: &[T]) -> Result<()>;

    /// The first `len` values of `x`; waits until they are computed.
    fn read<T: Plain>(&self, x: &Self::Buffer<T>, len: usize) -> Result<Vec<T>>;

    /// Sets the first `len` values of `out` to zero.
    fn clear<T: Plain>(&self, out: &mut Self::Buffer<T>, len: usize) -> Result<()>;

    /// `out[i] = x[i]`, rounded to the storage type.
    fn cast<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        x: &Self::Buffer<f32>,
        len: usize,
    ) -> Result<()>;

    /// `out[i] += x[i]`.
    fn add(&self, out: &mut Self::Buffer<f32>, x: &Self::Buffer<f32>, len: usize) -> Result<()>;

    /// Rows of a table: `out[t] = table[ids[t]]`. `out [T, H]`, `table [V, H]`, `ids [T]`.
    fn embed(
        &self,
        out: &mut Self::Buffer<f32>,
        table: &Self::Buffer<Self::Element>,
        ids: &Self::Buffer<u32>,
        rows: usize,
        hidden_size: usize,
    ) -> Result<()>;

    /// `dtable[ids[t]] += dout[t]`, in ascending t.
    fn embed_backward(
        &self,
        dtable: &mut Self::Buffer<f32>,
        dout: &Self::Buffer<Self::Element>,
        ids: &Self::Buffer<u32>,
        rows: usize,
        hidden_size: usize,
    ) -> Result<()>;

    /// Rows picked from x: `out[i] = x[index[first + i]]` for `i < rows`. f32 rows of `cols` values.
    fn gather_rows(
        &self,
        out: &mut Self::Buffer<f32>,
        x: &Self::Buffer<f32>,
        index: &Self::Buffer<u32>,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<()>;

    /// Rows put back: `out[index[first + i]] = x[i]` for `i < rows`; other rows stay as they are.
    fn scatter_rows(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        index: &Self::Buffer<u32>,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<()>;

    /// Columns put into wider rows: `out[t, first + c] = x[t, c]` for `c < cols`; other columns stay as
    /// they are. `out [T, out_cols]`, `x [T, cols]`.
    fn put_columns(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        rows: usize,
        out_cols: usize,
        first: usize,
        cols: usize,
    ) -> Result<()>;

    /// Columns taken from wider rows, which is also the gradient of [`Backend::put_columns`]:
    /// `out[t, c] = x[t, first + c]` for `c < cols`. `out [T, cols]`, `x [T, x_cols]`.
    fn take_columns(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        rows: usize,
        x_cols: usize,
        first: usize,
        cols: usize,
    ) -> Result<()>;

    /// Layer norm (Ba et al. 2016): `out = (x - mean) * rstd * weight + bias` per row, with
    /// `rstd = 1 / sqrt(var + eps)`. `stats [2, T]`: all means, then all rstds.
    fn layer_norm(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        stats: &mut Self::Buffer<f32>,
        x: &Self::Buffer<f32>,
        weight: &Self::Buffer<Self::Element>,
        bias: &Self::Buffer<Self::Element>,
        shape: NormShape,
    ) -> Result<()>;

    /// Gradient of [`Backend::layer_norm`] with respect to x.
    fn layer_norm_backward(
        &self,
        dx: &mut Self::Buffer<Self::Element>,
        dout: RowGradient<'_, Self>,
        x: &Self::Buffer<f32>,
        stats: &Self::Buffer<f32>,
        weight: &Self::Buffer<Self::Element>,
        shape: NormShape,
    ) -> Result<()>;

    /// Adds the gradient of [`Backend::layer_norm`] with respect to weight and bias, rows ascending.
    fn layer_norm_weight_gradient(
        &self,
        dweight: &mut Self::Buffer<f32>,
        dbias: &mut Self::Buffer<f32>,
        dout: RowGradient<'_, Self>,
        x: &Self::Buffer<f32>,
        stats: &Self::Buffer<f32>,
        shape: NormShape,
    ) -> Result<()>;

    /// RMS norm (Zhang & Sennrich 2019): `out = x * rstd * weight` per row, with
    /// `rstd = 1 / sqrt(mean(x²) + eps)`. `stats [T]`: all rstds.
    fn rms_norm(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        stats: &mut Self::Buffer<f32>,
        x: &Self::Buffer<f32>,
        weight: &Self::Buffer<Self::Element>,
        shape: NormShape,
    ) -> Result<()>;

    /// Gradient of [`Backend::rms_norm`] with respect to x, plus `residual`: the gradient of x where it
    /// is used beside the norm, as in a [`Backend::residual_sum`]. Rounded once.
    /// `dx`, `dout`, `residual`: `[T, H]`.
    fn rms_norm_backward(
        &self,
        dx: &mut Self::Buffer<Self::Element>,
        dout: &Self::Buffer<Self::Element>,
        residual: Option<&Self::Buffer<Self::Element>>,
        x: &Self::Buffer<f32>,
        stats: &Self::Buffer<f32>,
        weight: &Self::Buffer<Self::Element>,
        shape: NormShape,
    ) -> Result<()>;

    /// Adds the gradient of [`Backend::rms_norm`] with respect to weight, rows ascending.
    fn rms_norm_weight_gradient(
        &self,
        dweight: &mut Self::Buffer<f32>,
        dout: &Self::Buffer<Self::Element>,
        x: &Self::Buffer<f32>,
        stats: &Self::Buffer<f32>,
        shape: NormShape,
    ) -> Result<()>;

    /// `out = scale * x weightᵀ + bias + keep * out`, with `keep` 0 or 1 (0: `out` is not read).
    /// `out [T, O]`, `x [T, I]`, `weight [O, I]`, `bias [O]`.
    fn linear<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        x: &Self::Buffer<T>,
        weight: &Self::Buffer<T>,
        bias: Option<&Self::Buffer<T>>,
        shape: LinearShape,
        scale: f32,
        accumulate: bool,
    ) -> Result<()>;

    /// Gradient of [`Backend::linear`] with respect to x: `dx = scale * dout weight`, added to what
    /// `dx` holds when `accumulate`.
    fn linear_backward<T: Element>(
        &self,
        dx: &mut Self::Buffer<T>,
        dout: &Self::Buffer<T>,
        weight: &Self::Buffer<T>,
        shape: LinearShape,
        scale: f32,
        accumulate: bool,
    ) -> Result<()>;

    /// `dweight += scale * doutᵀ x`. `dweight [O, I]`.
    fn weight_gradient<T: Element>(
        &self,
        dweight: &mut Self::Buffer<f32>,
        dout: &Self::Buffer<T>,
        x: &Self::Buffer<T>,
        shape: LinearShape,
        scale: f32,
    ) -> Result<()>;

    /// `dbias[o] += sum over t of dout[t, o]`, rows ascending.
    fn bias_gradient<T: Element>(
        &self,
        dbias: &mut Self::Buffer<f32>,
        dout: &Self::Buffer<T>,
        shape: LinearShape,
    ) -> Result<()>;

    /// Gradients of a low-rank `out = scale * low weightᵀ`, as LoRA has it, in one pass over `dout`:
    /// `dlow = scale * dout weight` and `dweight += scale * doutᵀ low`.
    /// `dlow`, `low [T, I]`, `dweight`, `weight [O, I]`, `dout [T, O]`.
    fn low_rank_backward(
        &self,
        dlow: &mut Self::Buffer<Self::Element>,
        dweight: &mut Self::Buffer<f32>,
        dout: &Self::Buffer<Self::Element>,
        low: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        shape: LinearShape,
        scale: f32,
    ) -> Result<()> {
        self.weight_gradient(dweight, dout, low, shape, scale)?;
        self.linear_backward(dlow, dout, weight, shape, scale, false)
    }

    /// Rotary embedding (Su et al. 2021) on the query and key heads of x, in place: each pair of
    /// elements `(a, b)` that [`RotaryPositions`] names becomes `(a cos - b sin, b cos + a sin)`.
    /// With `inverse` the rotation is undone, which is also its gradient.
    fn rotary(
        &self,
        x: &mut Self::Buffer<Self::Element>,
        cos: &Self::Buffer<f32>,
        sin: &Self::Buffer<f32>,
        positions: RotaryPositions<'_, Self>,
        layout: &AttentionLayout,
        rows: usize,
        inverse: bool,
    ) -> Result<()>;

    /// Copies the key and value heads of each row of x into a cache: row `slots[t]` of `cache`,
    /// `[rows of the cache, 2, G, D]`.
    fn store_key_value(
        &self,
        cache: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        slots: &Self::Buffer<u32>,
        layout: &AttentionLayout,
        rows: usize,
    ) -> Result<()>;

    /// Softmax attention inside each sequence: `out [T, N, D]`, `lse [T, N]` (log of the sum of
    /// exponentials of the scaled scores, for the backward pass).
    ///
    /// Query i of a span stands at `t = kv_len - q_len + i`; it sees key k when `k <= t` or
    /// `k < context_length`, and all prefix keys. Scores are `scale * q·k`.
    fn attention(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        lse: &mut Self::Buffer<f32>,
        query: &Self::Buffer<Self::Element>,
        key_value: &Self::Buffer<Self::Element>,
        prefix: Option<Prefix<'_, Self>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Result<()>;

    /// Gradient of [`Backend::attention`] where queries, keys and values stand in one buffer and
    /// every query has its key: fills the query, key and value heads of `dqkv`, and
    /// `dprefix [S, P, 2, G, D]` where there is a prefix.
    fn attention_backward(
        &self,
        dqkv: &mut Self::Buffer<Self::Element>,
        dprefix: Option<&mut Self::Buffer<f32>>,
        dout: &Self::Buffer<Self::Element>,
        out: &Self::Buffer<Self::Element>,
        lse: &Self::Buffer<f32>,
        qkv: &Self::Buffer<Self::Element>,
        prefix: Option<Prefix<'_, Self>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Result<()>;

    /// One prefix per sequence with dropout of its own: `out [S, P, 2, G, D]` from `x [P, 2, G, D]`;
    /// `cols` is `2 G D`.
    fn prefix_dropout(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        dropout: Dropout,
        sequences: usize,
        prefix_len: usize,
        cols: usize,
    ) -> Result<()>;

    /// `dx[p, c] += sum over s of mask * dout[s, p, c]`, sequences ascending: the gradient of
    /// [`Backend::prefix_dropout`], and of sharing one prefix when `dropout` is `None`.
    fn prefix_gradient(
        &self,
        dx: &mut Self::Buffer<f32>,
        dout: &Self::Buffer<f32>,
        dropout: Option<Dropout>,
        sequences: usize,
        prefix_len: usize,
        cols: usize,
    ) -> Result<()>;

    /// Dropout of activations: `out = mask * x`, mask 0 or `1 / (1 - p)`, from counter-based random
    /// numbers of (dropout key, sequence, token in it, column). `out`, `x`: `[T, cols]`; the queries of
    /// the spans are the T rows, one sequence after another.
    fn dropout(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        dropout: Dropout,
        spans: &[Span],
        cols: usize,
    ) -> Result<()>;

    /// `dx += mask * dout` with the mask of [`Backend::dropout`].
    fn dropout_backward(
        &self,
        dx: &mut Self::Buffer<Self::Element>,
        dout: &Self::Buffer<Self::Element>,
        dropout: Dropout,
        spans: &[Span],
        cols: usize,
    ) -> Result<()>;

    /// GELU in its tanh form: `0.5 x (1 + tanh(0.7978845608028654 x (1 + 0.044715 x²)))`.
    fn gelu(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        len: usize,
    ) -> Result<()>;

    /// `dx = dx * gelu'(x)`, in place.
    fn gelu_backward(
        &self,
        dx: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        len: usize,
    ) -> Result<()>;

    /// [`Backend::gelu`] behind a linear layer: `pre = x weightᵀ + bias` and `out = gelu(pre)`.
    /// `out`, `pre`: `[T, O]`. A device may take GELU of the sum before it is rounded to `pre`, always so
    /// for a device and a shape; where it has nothing better, it takes one op after the other.
    fn linear_gelu(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        pre: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        bias: Option<&Self::Buffer<Self::Element>>,
        shape: LinearShape,
    ) -> Result<()> {
        self.linear(pre, x, weight, bias, shape, 1.0, false)?;
        self.gelu(out, pre, shape.rows * shape.out_features)
    }

    /// Gradient of a linear layer behind GELU, `linear(gelu(pre))`, with respect to `pre [T, I]`:
    /// `dpre = (dout weight) * gelu'(pre)`. A device may round the product on the way, as above.
    fn gelu_linear_backward(
        &self,
        dpre: &mut Self::Buffer<Self::Element>,
        dout: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        pre: &Self::Buffer<Self::Element>,
        shape: LinearShape,
    ) -> Result<()> {
        self.linear_backward(dpre, dout, weight, shape, 1.0, false)?;
        self.gelu_backward(dpre, pre, shape.rows * shape.in_features)
    }

    /// SwiGLU (Shazeer 2020): `out = silu(x[.., ..F]) * x[.., F..]` with
    /// `silu(a) = a / (1 + e^-a)`. `out [T, F]`, `x [T, 2 F]`.
    fn swiglu(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        rows: usize,
        inner_hidden_size: usize,
    ) -> Result<()>;

    /// Gradient of [`Backend::swiglu`]: `dx [T, 2 F]` from `dout [T, F]` and `x [T, 2 F]`.
    fn swiglu_backward(
        &self,
        dx: &mut Self::Buffer<Self::Element>,
        dout: &Self::Buffer<Self::Element>,
        x: &Self::Buffer<Self::Element>,
        rows: usize,
        inner_hidden_size: usize,
    ) -> Result<()>;

    /// `x = tanh(x)`, in place.
    fn tanh(&self, x: &mut Self::Buffer<f32>, len: usize) -> Result<()>;

    /// `dx = dx * (1 - out²)`, in place; `out` is what [`Backend::tanh`] left.
    fn tanh_backward(
        &self,
        dx: &mut Self::Buffer<f32>,
        out: &Self::Buffer<f32>,
        len: usize,
    ) -> Result<()>;

    /// The residual sum, in f32: `out = alpha * x + branch`.
    fn residual(
        &self,
        out: &mut Self::Buffer<f32>,
        x: &Self::Buffer<Self::Element>,
        alpha: f32,
        branch: &Self::Buffer<Self::Element>,
        len: usize,
    ) -> Result<()>;

    /// The residual sum of un-normed rows, in f32: `out = x + branch`. The gradient of both terms is
    /// that of `out`.
    fn residual_sum(
        &self,
        out: &mut Self::Buffer<f32>,
        x: &Self::Buffer<f32>,
        branch: &Self::Buffer<Self::Element>,
        len: usize,
    ) -> Result<()>;

    /// [`Backend::residual`] into `sum [T, H]` and [`Backend::layer_norm`] of it, to the bits of one
    /// after the other.
    fn residual_layer_norm(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        stats: &mut Self::Buffer<f32>,
        sum: &mut Self::Buffer<f32>,
        x: &Self::Buffer<Self::Element>,
        alpha: f32,
        branch: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        bias: &Self::Buffer<Self::Element>,
        shape: NormShape,
    ) -> Result<()> {
        self.residual(sum, x, alpha, branch, shape.rows * shape.cols)?;
        self.layer_norm(out, stats, sum, weight, bias, shape)
    }

    /// [`Backend::residual_sum`] into `sum [T, H]` and [`Backend::rms_norm`] of it, to the bits of one
    /// after the other.
    fn residual_rms_norm(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        stats: &mut Self::Buffer<f32>,
        sum: &mut Self::Buffer<f32>,
        x: &Self::Buffer<f32>,
        branch: &Self::Buffer<Self::Element>,
        weight: &Self::Buffer<Self::Element>,
        shape: NormShape,
    ) -> Result<()> {
        self.residual_sum(sum, x, branch, shape.rows * shape.cols)?;
        self.rms_norm(out, stats, sum, weight, shape)
    }

    /// Softmax cross-entropy of rows `first .. first + rows` of a list of targets, and its gradient.
    /// `loss[first + i] = -log softmax(logits[i])[ids[first + i]]`; afterwards
    /// `logits[i] = scale * (softmax(logits[i]) - one_hot)`. `logits [rows, V]`.
    fn cross_entropy(
        &self,
        loss: &mut Self::Buffer<f32>,
        logits: &mut Self::Buffer<Self::Element>,
        ids: &Self::Buffer<u32>,
        first: usize,
        rows: usize,
        vocab_size: usize,
        scale: f32,
    ) -> Result<()>;

    /// `out[index] = sum of x[..len]`.
    fn sum(
        &self,
        out: &mut Self::Buffer<f32>,
        index: usize,
        x: &Self::Buffer<f32>,
        len: usize,
    ) -> Result<()>;

    /// For each term `out[index] = sum of (scale * x[i])²` over `i < len`. The order of a sum depends
    /// on its own length alone, not on the terms beside it; no two terms have the same place.
    fn sum_squares(
        &self,
        out: &mut Self::Buffer<f32>,
        terms: &[SumOf<'_, Self>],
        scale: f32,
    ) -> Result<()>;

    /// The weights that codes stand for: `out[o, i] = code[o, i] * scales[o]`, rounded to float16 whatever
    /// the storage type, as [`Bits::dequantise_row`] does. `out [O, I]`, `scales [O]`; `codes` as [`Bits`]
    /// packs them, `[O, I]` bytes or, with an even I, `[O, I / 2]`.
    fn dequantise(
        &self,
        out: &mut Self::Buffer<Self::Element>,
        codes: &Self::Buffer<i8>,
        scales: &Self::Buffer<f16>,
        bits: Bits,
        rows: usize,
        cols: usize,
    ) -> Result<()>;

    /// Made-up weights of mean 0: `out[i]` is [`near_normal`](crate::random::near_normal) of word i of the
    /// key's stream, times `deviation / NEAR_NORMAL_DEVIATION` in f32, rounded to float16 whatever the
    /// storage type. Every backend makes the same bits.
    fn synthetic<T: Element>(
        &self,
        out: &mut Self::Buffer<T>,
        len: usize,
        key: Key,
        deviation: f32,
    ) -> Result<()>;

    /// The same as codes: `len` bytes of [`Bits::code_of`] of each number, as [`Bits`] packs them.
    fn synthetic_codes(
        &self,
        out: &mut Self::Buffer<i8>,
        len: usize,
        key: Key,
        bits: Bits,
    ) -> Result<()>;

    /// One AdamW step (Loshchilov & Hutter 2019) on the f32 master values of each tensor, then on its
    /// working copy: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g²` with
    /// `g = gradient_scale * gradient`; `master = master (1 - lr decay) - lr (m / c1) /
    /// (sqrt(v / c2) + eps)`; `working = master`.
    fn adamw(&self, tensors: &mut [AdamwTensor<'_, Self>], step: AdamwStep) -> Result<()>;
}
