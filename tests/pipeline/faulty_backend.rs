//! A backend whose ops can fail: before each of them a hook is asked.
#![allow(clippy::too_many_arguments)]

use std::cell::Cell;
use std::sync::Arc;

use half::f16;
use mp_train::backend::{
    AdamwStep, AdamwTensor, AttentionLayout, Backend, BackendError, Dropout, Element, LinearShape,
    Measured, Measuring, NormShape, Plain, Prefix, RotaryPositions, RowGradient, Span, SumOf,
};
use mp_train::pipeline::place::Place;
use mp_train::quant::Bits;
use mp_train::random::Key;

/// What a stage is about to do.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    pub rank: usize,
    /// The last place that was marked.
    pub place: Place,
    /// Ops since then.
    pub nth: usize,
    pub op: &'static str,
}

/// What an op does, apart from failing, hanging or panicking in the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    Compute,
    /// The first value of its output is no number. For `residual`.
    Spoil,
}

/// Asked before every op, on the thread of the stage.
pub type Hook = Arc<dyn Fn(Moment) -> Result<Then> + Send + Sync>;

pub struct FaultyBackend<B> {
    inner: B,
    rank: usize,
    place: Cell<u64>,
    nth: Cell<usize>,
    hook: Hook,
}

type Result<T> = std::result::Result<T, BackendError>;

impl<B: Backend> FaultyBackend<B> {
    pub fn new(inner: B, rank: usize, hook: &Hook) -> Self {
        FaultyBackend {
            inner,
            rank,
            place: Cell::new(0),
            nth: Cell::new(0),
            hook: Arc::clone(hook),
        }
    }

    fn before(&self, op: &'static str) -> Result<Then> {
        let nth = self.nth.get();
        self.nth.set(nth + 1);
        (self.hook)(Moment {
            rank: self.rank,
            place: Place::unpack(self.place.get()),
            nth,
            op,
        })
    }
}

fn gradient<'a, B: Backend>(dout: RowGradient<'a, FaultyBackend<B>>) -> RowGradient<'a, B> {
    RowGradient {
        dout: dout.dout,
        residual: dout.residual,
    }
}

fn positions_of<'a, B: Backend>(
    positions: RotaryPositions<'a, FaultyBackend<B>>,
) -> RotaryPositions<'a, B> {
    match positions {
        RotaryPositions::TwoDimensional {
            position,
            block_position,
        } => RotaryPositions::TwoDimensional {
            position,
            block_position,
        },
        RotaryPositions::Interleaved { position, width } => {
            RotaryPositions::Interleaved { position, width }
        }
    }
}

fn prefix_of<'a, B: Backend>(prefix: Prefix<'a, FaultyBackend<B>>) -> Prefix<'a, B> {
    Prefix {
        key_value: prefix.key_value,
        len: prefix.len,
        per_sequence: prefix.per_sequence,
    }
}

/// Ops whose arguments are the same for every backend.
macro_rules! ops {
    ($(fn $op:ident $(<T: $bound:ident>)? ($($name:ident: $type:ty),* $(,)?) $(-> $value:ty)?;)*) => {$(
        fn $op $(<T: $bound>)? (&self, $($name: $type),*) -> ops!(@result $($value)?) {
            self.before(stringify!($op))?;
            self.inner.$op($($name),*)
        }
    )*};
    (@result) => { Result<()> };
    (@result $value:ty) => { Result<$value> };
}

impl<B: Backend> Measuring for FaultyBackend<B> {
    fn measure(&self) -> Result<()> {
        self.inner.measure()
    }

    fn stamp(&self) -> Result<()> {
        self.inner.stamp()
    }

    fn measured(&self) -> Result<Measured> {
        self.inner.measured()
    }
}

impl<B: Backend> Backend for FaultyBackend<B> {
    type Element = B::Element;
    type Buffer<T: Plain> = B::Buffer<T>;

    fn mark(&self, place: u64) -> Result<()> {
        self.place.set(place);
        self.nth.set(0);
        self.inner.mark(place)
    }

    fn residual(
        &self,
        out: &mut B::Buffer<f32>,
        x: &B::Buffer<B::Element>,
        alpha: f32,
        branch: &B::Buffer<B::Element>,
        len: usize,
    ) -> Result<()> {
        let then = self.before("residual")?;
        self.inner.residual(out, x, alpha, branch, len)?;
        match then {
            Then::Compute => Ok(()),
            Then::Spoil => self.inner.write(out, &[f32::NAN]),
        }
    }

    fn upload_pieces<T: Plain, E: From<BackendError> + Send>(
        &self,
        len: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [T]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<B::Buffer<T>, E> {
        self.before("upload_pieces")?;
        self.inner.upload_pieces(len, unit, fill)
    }

    ops! {
        fn zeros<T: Plain>(len: usize) -> B::Buffer<T>;
        fn upload<T: Plain>(host: &[T]) -> B::Buffer<T>;
        fn write<T: Plain>(out: &mut B::Buffer<T>, host: &[T]);
        fn read<T: Plain>(x: &B::Buffer<T>, len: usize) -> Vec<T>;
        fn clear<T: Plain>(out: &mut B::Buffer<T>, len: usize);
        fn cast<T: Element>(out: &mut B::Buffer<T>, x: &B::Buffer<f32>, len: usize);
        fn add(out: &mut B::Buffer<f32>, x: &B::Buffer<f32>, len: usize);
        fn embed(
            out: &mut B::Buffer<f32>,
            table: &B::Buffer<B::Element>,
            ids: &B::Buffer<u32>,
            rows: usize,
            hidden_size: usize,
        );
        fn embed_backward(
            dtable: &mut B::Buffer<f32>,
            dout: &B::Buffer<B::Element>,
            ids: &B::Buffer<u32>,
            rows: usize,
            hidden_size: usize,
        );
        fn gather_rows(
            out: &mut B::Buffer<f32>,
            x: &B::Buffer<f32>,
            index: &B::Buffer<u32>,
            first: usize,
            rows: usize,
            cols: usize,
        );
        fn scatter_rows(
            out: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            index: &B::Buffer<u32>,
            first: usize,
            rows: usize,
            cols: usize,
        );
        fn put_columns(
            out: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            rows: usize,
            out_cols: usize,
            first: usize,
            cols: usize,
        );
        fn take_columns(
            out: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            rows: usize,
            x_cols: usize,
            first: usize,
            cols: usize,
        );
        fn layer_norm(
            out: &mut B::Buffer<B::Element>,
            stats: &mut B::Buffer<f32>,
            x: &B::Buffer<f32>,
            weight: &B::Buffer<B::Element>,
            bias: &B::Buffer<B::Element>,
            shape: NormShape,
        );
        fn rms_norm(
            out: &mut B::Buffer<B::Element>,
            stats: &mut B::Buffer<f32>,
            x: &B::Buffer<f32>,
            weight: &B::Buffer<B::Element>,
            shape: NormShape,
        );
        fn rms_norm_backward(
            dx: &mut B::Buffer<B::Element>,
            dout: &B::Buffer<B::Element>,
            residual: Option<&B::Buffer<B::Element>>,
            x: &B::Buffer<f32>,
            stats: &B::Buffer<f32>,
            weight: &B::Buffer<B::Element>,
            shape: NormShape,
        );
        fn rms_norm_weight_gradient(
            dweight: &mut B::Buffer<f32>,
            dout: &B::Buffer<B::Element>,
            x: &B::Buffer<f32>,
            stats: &B::Buffer<f32>,
            shape: NormShape,
        );
        fn linear<T: Element>(
            out: &mut B::Buffer<T>,
            x: &B::Buffer<T>,
            weight: &B::Buffer<T>,
            bias: Option<&B::Buffer<T>>,
            shape: LinearShape,
            scale: f32,
            accumulate: bool,
        );
        fn linear_backward<T: Element>(
            dx: &mut B::Buffer<T>,
            dout: &B::Buffer<T>,
            weight: &B::Buffer<T>,
            shape: LinearShape,
            scale: f32,
            accumulate: bool,
        );
        fn weight_gradient<T: Element>(
            dweight: &mut B::Buffer<f32>,
            dout: &B::Buffer<T>,
            x: &B::Buffer<T>,
            shape: LinearShape,
            scale: f32,
        );
        fn bias_gradient<T: Element>(
            dbias: &mut B::Buffer<f32>,
            dout: &B::Buffer<T>,
            shape: LinearShape,
        );
        fn store_key_value(
            cache: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            slots: &B::Buffer<u32>,
            layout: &AttentionLayout,
            rows: usize,
        );
        fn prefix_dropout(
            out: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            dropout: Dropout,
            sequences: usize,
            prefix_len: usize,
            cols: usize,
        );
        fn prefix_gradient(
            dx: &mut B::Buffer<f32>,
            dout: &B::Buffer<f32>,
            dropout: Option<Dropout>,
            sequences: usize,
            prefix_len: usize,
            cols: usize,
        );
        fn dropout(
            out: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            dropout: Dropout,
            spans: &[Span],
            cols: usize,
        );
        fn dropout_backward(
            dx: &mut B::Buffer<B::Element>,
            dout: &B::Buffer<B::Element>,
            dropout: Dropout,
            spans: &[Span],
            cols: usize,
        );
        fn gelu(out: &mut B::Buffer<B::Element>, x: &B::Buffer<B::Element>, len: usize);
        fn gelu_backward(dx: &mut B::Buffer<B::Element>, x: &B::Buffer<B::Element>, len: usize);
        fn swiglu(
            out: &mut B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            rows: usize,
            inner_hidden_size: usize,
        );
        fn swiglu_backward(
            dx: &mut B::Buffer<B::Element>,
            dout: &B::Buffer<B::Element>,
            x: &B::Buffer<B::Element>,
            rows: usize,
            inner_hidden_size: usize,
        );
        fn tanh(x: &mut B::Buffer<f32>, len: usize);
        fn tanh_backward(dx: &mut B::Buffer<f32>, out: &B::Buffer<f32>, len: usize);
        fn residual_sum(
            out: &mut B::Buffer<f32>,
            x: &B::Buffer<f32>,
            branch: &B::Buffer<B::Element>,
            len: usize,
        );
        fn cross_entropy(
            loss: &mut B::Buffer<f32>,
            logits: &mut B::Buffer<B::Element>,
            ids: &B::Buffer<u32>,
            first: usize,
            rows: usize,
            vocab_size: usize,
            scale: f32,
        );
        fn sum(out: &mut B::Buffer<f32>, index: usize, x: &B::Buffer<f32>, len: usize);
        fn dequantise(
            out: &mut B::Buffer<B::Element>,
            codes: &B::Buffer<i8>,
            scales: &B::Buffer<f16>,
            bits: Bits,
            rows: usize,
            cols: usize,
        );
        fn synthetic<T: Element>(
            out: &mut B::Buffer<T>,
            len: usize,
            key: Key,
            deviation: f32,
        );
        fn synthetic_codes(out: &mut B::Buffer<i8>, len: usize, key: Key, bits: Bits);
    }

    fn layer_norm_backward(
        &self,
        dx: &mut B::Buffer<B::Element>,
        dout: RowGradient<'_, Self>,
        x: &B::Buffer<f32>,
        stats: &B::Buffer<f32>,
        weight: &B::Buffer<B::Element>,
        shape: NormShape,
    ) -> Result<()> {
        self.before("layer_norm_backward")?;
        let dout = gradient(dout);
        self.inner
            .layer_norm_backward(dx, dout, x, stats, weight, shape)
    }

    fn layer_norm_weight_gradient(
        &self,
        dweight: &mut B::Buffer<f32>,
        dbias: &mut B::Buffer<f32>,
        dout: RowGradient<'_, Self>,
        x: &B::Buffer<f32>,
        stats: &B::Buffer<f32>,
        shape: NormShape,
    ) -> Result<()> {
        self.before("layer_norm_weight_gradient")?;
        let dout = gradient(dout);
        self.inner
            .layer_norm_weight_gradient(dweight, dbias, dout, x, stats, shape)
    }

    fn rotary(
        &self,
        x: &mut B::Buffer<B::Element>,
        cos: &B::Buffer<f32>,
        sin: &B::Buffer<f32>,
        positions: RotaryPositions<'_, Self>,
        layout: &AttentionLayout,
        rows: usize,
        inverse: bool,
    ) -> Result<()> {
        self.before("rotary")?;
        let positions = positions_of(positions);
        self.inner
            .rotary(x, cos, sin, positions, layout, rows, inverse)
    }

    fn attention(
        &self,
        out: &mut B::Buffer<B::Element>,
        lse: &mut B::Buffer<f32>,
        query: &B::Buffer<B::Element>,
        key_value: &B::Buffer<B::Element>,
        prefix: Option<Prefix<'_, Self>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Result<()> {
        self.before("attention")?;
        let prefix = prefix.map(prefix_of);
        self.inner
            .attention(out, lse, query, key_value, prefix, layout, spans, scale)
    }

    fn attention_backward(
        &self,
        dqkv: &mut B::Buffer<B::Element>,
        dprefix: Option<&mut B::Buffer<f32>>,
        dout: &B::Buffer<B::Element>,
        out: &B::Buffer<B::Element>,
        lse: &B::Buffer<f32>,
        qkv: &B::Buffer<B::Element>,
        prefix: Option<Prefix<'_, Self>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Result<()> {
        self.before("attention_backward")?;
        let prefix = prefix.map(prefix_of);
        self.inner.attention_backward(
            dqkv, dprefix, dout, out, lse, qkv, prefix, layout, spans, scale,
        )
    }

    fn sum_squares(
        &self,
        out: &mut B::Buffer<f32>,
        terms: &[SumOf<'_, Self>],
        scale: f32,
    ) -> Result<()> {
        self.before("sum_squares")?;
        let terms: Vec<SumOf<'_, B>> = terms
            .iter()
            .map(|&SumOf { index, x, len }| SumOf { index, x, len })
            .collect();
        self.inner.sum_squares(out, &terms, scale)
    }

    fn adamw(&self, tensors: &mut [AdamwTensor<'_, Self>], step: AdamwStep) -> Result<()> {
        self.before("adamw")?;
        let tensors = tensors.iter_mut().map(|tensor| AdamwTensor {
            working: &mut *tensor.working,
            master: &mut *tensor.master,
            exp_avg: &mut *tensor.exp_avg,
            exp_avg_sq: &mut *tensor.exp_avg_sq,
            gradient: tensor.gradient,
            weight_decay: tensor.weight_decay,
            len: tensor.len,
        });
        let mut tensors: Vec<AdamwTensor<'_, B>> = tensors.collect();
        self.inner.adamw(&mut tensors, step)
    }
}
