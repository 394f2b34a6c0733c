//! Ops row by row and element by element, the loss and the optimiser.

use half::f16;
use mp_train::backend::{
    AdamwStep, AdamwTensor, Backend, BackendError, Dropout, NormShape, RowGradient, Span, SumOf,
};
use mp_train::quant::Bits;
use mp_train::random::{Domain, Key};

use super::{Sizes, Visit, Work, elements, filled, memory, picked, stored, words};

const AFFINE: &str =
    "each row reads weight and bias, or mean and rstd, again, from the L2 or L1 cache";
const CHUNKS: &str =
    "sums over chunks of rows are kept beside the rows, so that no order of blocks shows";
const LOSS: &str = "a row is read twice, for its sum and for its gradient: it does not fit in registers, \
                    but in the L2 cache";
const MASK: &str = "each thread reads where its sequence begins";
const SCALES: &str = "each thread reads the scale of its row";
const INDEX: &str = "each thread reads the index of its row";
const PIECES: &str = "each thread reads its tensor's row of the table; the sum has a second pass";

pub(super) fn visit<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    layer_norm(b, sizes, visit);
    rms_norm(b, sizes, visit);
    residual_norms(b, sizes, visit);
    activations(b, sizes, visit);
    residuals(b, sizes, visit);
    dropout(b, sizes, visit);
    rows(b, sizes, visit);
    cross_entropy(b, sizes, visit);
    optimiser(b, sizes, visit);
    dequantise(b, sizes, visit);
    synthetic(b, sizes, visit);
}

fn norm_shape(sizes: &Sizes) -> NormShape {
    NormShape {
        rows: sizes.rows,
        cols: sizes.hidden_size,
        eps: 1e-5,
    }
}

/// Means, then reciprocal deviations.
fn stats<B: Backend>(b: &B, rows: usize) -> B::Buffer<f32> {
    filled(b, 2 * rows, |i| if i < rows { 0.0 } else { 1.7 })
}

fn layer_norm<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h, shape) = (sizes.rows, sizes.hidden_size, norm_shape(sizes));
    let (x, weight, bias) = (
        elements::<B, f32>(b, t * h, 1.0),
        elements(b, h, 1.0),
        elements(b, h, 0.1),
    );
    let (mut out, mut sums) = (b.zeros(t * h).unwrap(), b.zeros(2 * t).unwrap());
    let work = Work::over(
        t * h,
        words(t * h) + stored::<B>(2 * h),
        stored::<B>(t * h) + words(2 * t),
    );
    memory(b, visit, "layer_norm", work, AFFINE, move |b| {
        b.layer_norm(&mut out, &mut sums, &x, &weight, &bias, shape)
    });

    let (x, weight, stats) = (
        elements::<B, f32>(b, t * h, 1.0),
        elements(b, h, 1.0),
        self::stats(b, t),
    );
    let (dout, residual) = (elements(b, t * h, 0.1), elements(b, t * h, 0.1));
    let mut dx = b.zeros(t * h).unwrap();
    let read = stored::<B>(2 * t * h) + words(t * h) + stored::<B>(h) + words(2 * t);
    let work = Work::over(t * h, read, stored::<B>(t * h));
    memory(b, visit, "layer_norm_backward", work, AFFINE, move |b| {
        let gradient = RowGradient {
            dout: &dout,
            residual: Some((&residual, 7.5)),
        };
        b.layer_norm_backward(&mut dx, gradient, &x, &stats, &weight, shape)
    });

    let (x, dout, stats) = (
        elements::<B, f32>(b, t * h, 1.0),
        elements(b, t * h, 0.1),
        self::stats(b, t),
    );
    let (mut dweight, mut dbias) = (b.zeros(h).unwrap(), b.zeros(h).unwrap());
    let read = stored::<B>(t * h) + words(t * h) + words(2 * t) + words(2 * h);
    let work = Work::over(t * h, read, words(2 * h));
    let name = "layer_norm_weight_gradient";
    memory(b, visit, name, work, CHUNKS, move |b| {
        let gradient = RowGradient {
            dout: &dout,
            residual: None,
        };
        b.layer_norm_weight_gradient(&mut dweight, &mut dbias, gradient, &x, &stats, shape)
    });
}

fn residual_norms<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h, shape) = (sizes.rows, sizes.hidden_size, norm_shape(sizes));
    let (x, branch) = (elements(b, t * h, 1.0), elements(b, t * h, 1.0));
    let (weight, bias) = (elements(b, h, 1.0), elements(b, h, 0.1));
    let (mut out, mut stats) = (b.zeros(t * h).unwrap(), b.zeros(2 * t).unwrap());
    let mut sum = b.zeros(t * h).unwrap();
    let read = stored::<B>(2 * t * h + 2 * h);
    let written = words(t * h + 2 * t) + stored::<B>(t * h);
    let (name, work) = ("residual_layer_norm", Work::over(t * h, read, written));
    memory(b, visit, name, work, AFFINE, move |b| {
        b.residual_layer_norm(
            &mut out, &mut stats, &mut sum, &x, 7.5, &branch, &weight, &bias, shape,
        )
    });

    let (x, branch) = (elements::<B, f32>(b, t * h, 1.0), elements(b, t * h, 1.0));
    let weight = elements(b, h, 1.0);
    let (mut out, mut stats) = (b.zeros(t * h).unwrap(), b.zeros(t).unwrap());
    let mut sum = b.zeros(t * h).unwrap();
    let read = words(t * h) + stored::<B>(t * h + h);
    let written = words(t * h + t) + stored::<B>(t * h);
    let (name, work) = ("residual_rms_norm", Work::over(t * h, read, written));
    memory(b, visit, name, work, AFFINE, move |b| {
        b.residual_rms_norm(&mut out, &mut stats, &mut sum, &x, &branch, &weight, shape)
    });
}

fn rms_norm<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h, shape) = (sizes.rows, sizes.hidden_size, norm_shape(sizes));
    let (x, weight) = (elements::<B, f32>(b, t * h, 1.0), elements(b, h, 1.0));
    let (mut out, mut sums) = (b.zeros(t * h).unwrap(), b.zeros(t).unwrap());
    let work = Work::over(
        t * h,
        words(t * h) + stored::<B>(h),
        stored::<B>(t * h) + words(t),
    );
    memory(b, visit, "rms_norm", work, AFFINE, move |b| {
        b.rms_norm(&mut out, &mut sums, &x, &weight, shape)
    });

    let (x, weight, stats) = (
        elements::<B, f32>(b, t * h, 1.0),
        elements(b, h, 1.0),
        filled(b, t, |_| 1.7f32),
    );
    let (dout, residual) = (elements(b, t * h, 0.1), elements(b, t * h, 0.1));
    let mut dx = b.zeros(t * h).unwrap();
    let read = stored::<B>(2 * t * h) + words(t * h) + stored::<B>(h) + words(t);
    let work = Work::over(t * h, read, stored::<B>(t * h));
    memory(b, visit, "rms_norm_backward", work, AFFINE, move |b| {
        b.rms_norm_backward(&mut dx, &dout, Some(&residual), &x, &stats, &weight, shape)
    });
}

fn activations<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, f) = (sizes.rows, sizes.inner_hidden_size);
    let len = t * f;
    let x = elements(b, len, 2.0);
    let mut out = b.zeros(len).unwrap();
    let work = Work::over(len, stored::<B>(len), stored::<B>(len));
    memory(b, visit, "gelu", work, "", move |b| {
        b.gelu(&mut out, &x, len)
    });

    let x = elements(b, len, 2.0);
    let mut dx = elements(b, len, 0.1);
    let work = Work::over(len, stored::<B>(2 * len), stored::<B>(len));
    memory(b, visit, "gelu_backward", work, "", move |b| {
        b.gelu_backward(&mut dx, &x, len)
    });

    let x = elements(b, 2 * len, 2.0);
    let mut out = b.zeros(len).unwrap();
    let work = Work::over(len, stored::<B>(2 * len), stored::<B>(len));
    memory(b, visit, "swiglu", work, "", move |b| {
        b.swiglu(&mut out, &x, t, f)
    });

    let (x, dout) = (elements(b, 2 * len, 2.0), elements(b, len, 0.1));
    let mut dx = b.zeros(2 * len).unwrap();
    let work = Work::over(len, stored::<B>(3 * len), stored::<B>(2 * len));
    memory(b, visit, "swiglu_backward", work, "", move |b| {
        b.swiglu_backward(&mut dx, &dout, &x, t, f)
    });
}

fn residuals<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let len = sizes.rows * sizes.hidden_size;
    let (x, branch) = (elements(b, len, 1.0), elements(b, len, 1.0));
    let mut out = b.zeros(len).unwrap();
    let work = Work::over(len, stored::<B>(2 * len), words(len));
    memory(b, visit, "residual", work, "", move |b| {
        b.residual(&mut out, &x, 7.5, &branch, len)
    });

    let (x, branch) = (elements::<B, f32>(b, len, 1.0), elements(b, len, 1.0));
    let mut out = b.zeros(len).unwrap();
    let work = Work::over(len, words(len) + stored::<B>(len), words(len));
    memory(b, visit, "residual_sum", work, "", move |b| {
        b.residual_sum(&mut out, &x, &branch, len)
    });

    let x = elements::<B, f32>(b, len, 1.0);
    let mut out: B::Buffer<B::Element> = b.zeros(len).unwrap();
    let work = Work::over(len, words(len), stored::<B>(len));
    memory(b, visit, "cast", work, "", move |b| {
        b.cast(&mut out, &x, len)
    });

    let x = elements::<B, f32>(b, len, 1e-3);
    let mut out = b.zeros(len).unwrap();
    let work = Work::over(len, words(2 * len), words(len));
    memory(b, visit, "add", work, "", move |b| b.add(&mut out, &x, len));
}

fn dropout<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h) = (sizes.rows, sizes.hidden_size);
    let dropout = Dropout {
        p: 0.1,
        key: Key::new(1, Domain::LoraDropout),
    };
    let spans = [Span {
        q_start: 0,
        q_len: t,
        kv_start: 0,
        kv_len: t,
        context_length: 0,
    }];
    let x = elements(b, t * h, 1.0);
    let mut out = b.zeros(t * h).unwrap();
    let work = Work::over(t * h, stored::<B>(t * h), stored::<B>(t * h));
    memory(b, visit, "dropout", work, MASK, move |b| {
        b.dropout(&mut out, &x, dropout, &spans, h)
    });

    let dout = elements(b, t * h, 1e-3);
    let mut dx = b.zeros(t * h).unwrap();
    let work = Work::over(t * h, stored::<B>(2 * t * h), stored::<B>(t * h));
    memory(b, visit, "dropout_backward", work, MASK, move |b| {
        b.dropout_backward(&mut dx, &dout, dropout, &spans, h)
    });
}

fn rows<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h, v, targets) = (
        sizes.rows,
        sizes.hidden_size,
        sizes.vocab_size,
        sizes.target_rows,
    );
    let table = elements(b, v * h, 1.0);
    let ids = b.upload(&picked(t, v)).unwrap();
    let mut out = b.zeros(t * h).unwrap();
    let work = Work::over(t * h, stored::<B>(t * h) + words(t), words(t * h));
    memory(b, visit, "embed", work, INDEX, move |b| {
        b.embed(&mut out, &table, &ids, t, h)
    });

    let x = elements::<B, f32>(b, t * h, 1.0);
    let index = b.upload(&picked(targets, t)).unwrap();
    let mut out = b.zeros(targets * h).unwrap();
    let work = Work::over(
        targets * h,
        words(targets * h + targets),
        words(targets * h),
    );
    memory(b, visit, "gather_rows", work, INDEX, move |b| {
        b.gather_rows(&mut out, &x, &index, 0, targets, h)
    });

    let x = elements(b, targets * h, 1.0);
    let index = b.upload(&picked(targets, t)).unwrap();
    let mut out: B::Buffer<B::Element> = b.zeros(t * h).unwrap();
    let work = Work::over(
        targets * h,
        stored::<B>(targets * h) + words(targets),
        stored::<B>(targets * h),
    );
    memory(b, visit, "scatter_rows", work, INDEX, move |b| {
        b.scatter_rows(&mut out, &x, &index, 0, targets, h)
    });
}

fn cross_entropy<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (rows, v) = (sizes.target_rows, sizes.vocab_size);
    let ids = b.upload(&picked(rows, v)).unwrap();
    let mut logits = elements(b, rows * v, 4.0);
    let mut loss = b.zeros(rows).unwrap();
    let logits_bytes = stored::<B>(rows * v);
    let work = Work::over(
        rows * v,
        logits_bytes + words(rows),
        logits_bytes + words(rows),
    );
    memory(b, visit, "cross_entropy", work, LOSS, move |b| {
        b.cross_entropy(&mut loss, &mut logits, &ids, 0, rows, v, 1.0 / rows as f32)
    });
}

/// One trainable matrix with its gradient, moments and copies.
struct Trained<B: Backend> {
    working: B::Buffer<B::Element>,
    master: B::Buffer<f32>,
    exp_avg: B::Buffer<f32>,
    exp_avg_sq: B::Buffer<f32>,
    gradient: B::Buffer<f32>,
    len: usize,
}

impl<B: Backend> Trained<B> {
    fn new(b: &B, len: usize) -> Self {
        Trained {
            working: elements(b, len, 0.1),
            master: elements(b, len, 0.1),
            exp_avg: b.zeros(len).unwrap(),
            exp_avg_sq: b.zeros(len).unwrap(),
            gradient: elements(b, len, 1e-3),
            len,
        }
    }
}

/// Both LoRA matrices of every block.
fn trained<B: Backend>(b: &B, sizes: &Sizes) -> Vec<Trained<B>> {
    let (h, r) = (sizes.hidden_size, sizes.rank);
    let lens = (0..sizes.blocks).flat_map(|_| [r * h, 3 * h * r]);
    lens.map(|len| Trained::new(b, len)).collect()
}

fn optimiser<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let mut tensors = trained(b, sizes);
    let all: usize = tensors.iter().map(|tensor| tensor.len).sum();
    let work = Work::over(all, words(4 * all), words(3 * all) + stored::<B>(all));
    memory(b, visit, "adamw", work, PIECES, move |b| {
        adamw(b, &mut tensors)
    });

    let tensors = trained(b, sizes);
    let mut sums = b.zeros(tensors.len()).unwrap();
    let work = Work::over(all, words(all), words(tensors.len()));
    memory(b, visit, "sum_squares", work, PIECES, move |b| {
        let terms: Vec<SumOf<'_, B>> = tensors
            .iter()
            .enumerate()
            .map(|(index, tensor)| SumOf {
                index,
                x: &tensor.gradient,
                len: tensor.len,
            })
            .collect();
        b.sum_squares(&mut sums, &terms, 1.0)
    });
}

fn adamw<B: Backend>(b: &B, tensors: &mut [Trained<B>]) -> Result<(), BackendError> {
    let step = AdamwStep {
        learning_rate: 1e-4,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        bias_correction1: 0.1,
        bias_correction2: 0.001,
        gradient_scale: 1.0,
    };
    let mut list: Vec<AdamwTensor<'_, B>> = tensors
        .iter_mut()
        .map(|tensor| AdamwTensor {
            working: &mut tensor.working,
            master: &mut tensor.master,
            exp_avg: &mut tensor.exp_avg,
            exp_avg_sq: &mut tensor.exp_avg_sq,
            gradient: &tensor.gradient,
            weight_decay: 0.0,
            len: tensor.len,
        })
        .collect();
    b.adamw(&mut list, step)
}

/// The largest matrix of a block.
fn dequantise<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (rows, cols) = (sizes.inner_hidden_size, sizes.hidden_size);
    for (name, bits) in [
        ("dequantise int8", Bits::Eight),
        ("dequantise int4", Bits::Four),
    ] {
        let code_bytes = rows * bits.row_bytes(cols);
        let codes = filled(b, code_bytes, |i| (i * 37 % 251) as u8 as i8);
        let scales = filled(b, rows, |_| f16::from_f32(0.01));
        let mut out = b.zeros(rows * cols).unwrap();
        let work = Work::over(rows * cols, code_bytes + 2 * rows, stored::<B>(rows * cols));
        memory(b, visit, name, work, SCALES, move |b| {
            b.dequantise(&mut out, &codes, &scales, bits, rows, cols)
        });
    }
}

fn synthetic<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let len = sizes.inner_hidden_size * sizes.hidden_size;
    let key = Key::new(7, Domain::ModelInit);
    let mut out = b.zeros::<B::Element>(len).unwrap();
    let work = Work::over(len, 0, stored::<B>(len));
    memory(b, visit, "synthetic", work, "", move |b| {
        b.synthetic(&mut out, len, key, 0.02)
    });
    for (name, bits) in [
        ("synthetic int8", Bits::Eight),
        ("synthetic int4", Bits::Four),
    ] {
        let bytes = sizes.inner_hidden_size * bits.row_bytes(sizes.hidden_size);
        let mut codes = b.zeros(bytes).unwrap();
        memory(b, visit, name, Work::over(len, 0, bytes), "", move |b| {
            b.synthetic_codes(&mut codes, bytes, key, bits)
        });
    }
}
