//! Matrix products: those of a block and of the head, and the narrow ones of LoRA.

use mp_train::backend::{Backend, LinearShape, Sums};

use super::{Bound, Case, Sizes, Visit, Work, elements, memory, stored, words};

pub(super) fn visit<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h, f) = (sizes.rows, sizes.hidden_size, sizes.inner_hidden_size);
    let blocks = [
        ("query_key_value", t, h, 3 * h),
        ("attention_dense", t, h, h),
        ("dense_h_to_4h", t, h, f),
        ("dense_4h_to_h", t, f, h),
    ];
    for (name, rows, in_features, out_features) in blocks {
        let shape = LinearShape {
            rows,
            in_features,
            out_features,
            sums: Sums::F32,
        };
        // LoRA's share stands in the result already: the product adds to it.
        let accumulate = name == "query_key_value";
        forward(b, visit, name, shape, true, accumulate);
        backward(b, visit, name, shape, accumulate);
    }
    let head = LinearShape {
        rows: sizes.target_rows,
        in_features: h,
        out_features: sizes.vocab_size,
        sums: Sums::F32,
    };
    forward(b, visit, "lm_head", head, false, false);
    backward(b, visit, "lm_head", head, false);
    with_gelu(b, sizes, visit);
    weight_gradient(b, sizes, visit);
    low_rank(b, sizes, visit);
}

fn flops(shape: LinearShape) -> usize {
    2 * shape.rows * shape.in_features * shape.out_features
}

/// Bytes of input, weight and output.
fn operands<B: Backend>(shape: LinearShape) -> [usize; 3] {
    let LinearShape {
        rows,
        in_features,
        out_features,
        ..
    } = shape;
    [
        rows * in_features,
        in_features * out_features,
        rows * out_features,
    ]
    .map(stored::<B>)
}

/// Weights of a size that keeps the output's around 1.
fn weight<B: Backend>(b: &B, shape: LinearShape) -> B::Buffer<B::Element> {
    let size = 1.7 / (shape.in_features as f32).sqrt();
    elements(b, shape.in_features * shape.out_features, size)
}

fn product<B: Backend>(
    b: &B,
    visit: &mut Visit<'_, B>,
    name: String,
    work: Work,
    run: impl FnMut(&B) -> Result<(), mp_train::backend::BackendError> + 'static,
) {
    visit(
        b,
        Case {
            name,
            bound: Bound::Products,
            work,
            note: "",
            run: Box::new(run),
        },
    );
}

fn forward<B: Backend>(
    b: &B,
    visit: &mut Visit<'_, B>,
    name: &str,
    shape: LinearShape,
    bias: bool,
    accumulate: bool,
) {
    let weight = weight(b, shape);
    let x = elements(b, shape.rows * shape.in_features, 1.0);
    let bias = bias.then(|| elements(b, shape.out_features, 0.1));
    let mut out = b.zeros(shape.rows * shape.out_features).unwrap();
    let [input, weights, output] = operands::<B>(shape);
    let added_to = if accumulate { output } else { 0 };
    let elements = shape.rows * shape.out_features;
    let work = Work::over(elements, input + weights + added_to, output).with_flops(flops(shape));
    product(b, visit, format!("{name} forward"), work, move |b| {
        b.linear(&mut out, &x, &weight, bias.as_ref(), shape, 1.0, accumulate)
    });
}

fn backward<B: Backend>(
    b: &B,
    visit: &mut Visit<'_, B>,
    name: &str,
    shape: LinearShape,
    accumulate: bool,
) {
    let weight = weight(b, shape);
    let dout = elements(b, shape.rows * shape.out_features, 0.1);
    let mut dx = b.zeros(shape.rows * shape.in_features).unwrap();
    let [input, weights, output] = operands::<B>(shape);
    let added_to = if accumulate { input } else { 0 };
    let elements = shape.rows * shape.in_features;
    let work = Work::over(elements, output + weights + added_to, input).with_flops(flops(shape));
    product(b, visit, format!("{name} backward"), work, move |b| {
        b.linear_backward(&mut dx, &dout, &weight, shape, 1.0, accumulate)
    });
}

/// The products beside GELU, which may have it in their epilogues.
fn with_gelu<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let (t, h, f) = (sizes.rows, sizes.hidden_size, sizes.inner_hidden_size);
    let (widen, narrow) = (
        LinearShape {
            rows: t,
            in_features: h,
            out_features: f,
            sums: Sums::F32,
        },
        LinearShape {
            rows: t,
            in_features: f,
            out_features: h,
            sums: Sums::F32,
        },
    );
    let inner = stored::<B>(t * f);
    let [input, weights, output] = operands::<B>(widen);
    let work = Work::over(t * f, input + weights, output + inner).with_flops(flops(widen));
    let (x, matrix, bias) = (
        elements(b, t * h, 1.0),
        weight(b, widen),
        elements(b, f, 0.1),
    );
    let (mut out, mut pre) = (b.zeros(t * f).unwrap(), b.zeros(t * f).unwrap());
    let name = "dense_h_to_4h_gelu forward".to_owned();
    product(b, visit, name, work, move |b| {
        b.linear_gelu(&mut out, &mut pre, &x, &matrix, Some(&bias), widen)
    });

    let [input, weights, output] = operands::<B>(narrow);
    let work = Work::over(t * f, output + weights + inner, input).with_flops(flops(narrow));
    let (dout, matrix, pre) = (
        elements(b, t * h, 0.1),
        weight(b, narrow),
        elements(b, t * f, 1.0),
    );
    let mut dpre = b.zeros(t * f).unwrap();
    let name = "gelu_dense_4h_to_h backward".to_owned();
    product(b, visit, name, work, move |b| {
        b.gelu_linear_backward(&mut dpre, &dout, &matrix, &pre, narrow)
    });
}

/// The largest of a block, which training of the whole model has.
fn weight_gradient<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let shape = LinearShape {
        rows: sizes.rows,
        in_features: sizes.hidden_size,
        out_features: sizes.inner_hidden_size,
        sums: Sums::F32,
    };
    let x = elements::<B, B::Element>(b, shape.rows * shape.in_features, 1.0);
    let dout = elements(b, shape.rows * shape.out_features, 0.1);
    let weights = shape.in_features * shape.out_features;
    let mut dweight = b.zeros(weights).unwrap();
    let [input, _, output] = operands::<B>(shape);
    let work = Work::over(weights, input + output + words(weights), words(weights));
    let name = "dense_h_to_4h weight_gradient".to_owned();
    product(b, visit, name, work.with_flops(flops(shape)), move |b| {
        b.weight_gradient(&mut dweight, &dout, &x, shape, 1.0)
    });
}

const DOWN: &str = "each block of 16 rows reads the narrow matrix again, from the L2 cache";
const UP: &str = "each block of 256 columns reads the narrow rows again, from the L2 cache";
const BOTH: &str = "parts of both gradients are written and added up; each block of columns reads the narrow \
                    rows again, and each of rows the narrow matrix, from the L2 cache";
const GRADIENT: &str = "two lanes of a warp take what one access brings; each block of 32 columns reads the \
                        narrow rows again, from the L2 cache";

/// LoRA at query_key_value: `out = scale * (x Aᵀ) Bᵀ`, to which the layer's product adds, and its gradients.
fn low_rank<B: Backend>(b: &B, sizes: &Sizes, visit: &mut Visit<'_, B>) {
    let down = LinearShape {
        rows: sizes.rows,
        in_features: sizes.hidden_size,
        out_features: sizes.rank,
        sums: Sums::F32,
    };
    let up = LinearShape {
        rows: sizes.rows,
        in_features: sizes.rank,
        out_features: 3 * sizes.hidden_size,
        sums: Sums::F32,
    };
    let [x_bytes, a_bytes, low_bytes] = operands::<B>(down);
    let [_, b_bytes, out_bytes] = operands::<B>(up);

    let (x, matrix) = (
        elements(b, down.rows * down.in_features, 1.0),
        weight(b, down),
    );
    let mut low = b.zeros(down.rows * down.out_features).unwrap();
    let work = Work::over(down.rows * down.in_features, x_bytes + a_bytes, low_bytes)
        .with_flops(flops(down));
    memory(b, visit, "lora_down forward", work, DOWN, move |b| {
        b.linear(&mut low, &x, &matrix, None, down, 1.0, false)
    });

    let (low, matrix) = (elements(b, up.rows * up.in_features, 1.0), weight(b, up));
    let mut out = b.zeros(up.rows * up.out_features).unwrap();
    let work =
        Work::over(up.rows * up.out_features, low_bytes + b_bytes, out_bytes).with_flops(flops(up));
    memory(b, visit, "lora_up forward", work, UP, move |b| {
        b.linear(&mut out, &low, &matrix, None, up, 4.0, false)
    });

    let (dout, matrix) = (elements(b, up.rows * up.out_features, 0.1), weight(b, up));
    let mut dlow = b.zeros(up.rows * up.in_features).unwrap();
    let work =
        Work::over(up.rows * up.out_features, out_bytes + b_bytes, low_bytes).with_flops(flops(up));
    memory(b, visit, "lora_up backward", work, DOWN, move |b| {
        b.linear_backward(&mut dlow, &dout, &matrix, up, 1.0, false)
    });

    let (dlow, matrix) = (
        elements(b, down.rows * down.out_features, 0.1),
        weight(b, down),
    );
    let mut dx = b.zeros(down.rows * down.in_features).unwrap();
    let work = Work::over(down.rows * down.in_features, low_bytes + a_bytes, x_bytes)
        .with_flops(flops(down));
    memory(b, visit, "lora_down backward", work, UP, move |b| {
        b.linear_backward(&mut dx, &dlow, &matrix, down, 4.0, false)
    });

    let (dout, low, matrix) = (
        elements(b, up.rows * up.out_features, 0.1),
        elements(b, up.rows * up.in_features, 1.0),
        weight(b, up),
    );
    let weights = up.in_features * up.out_features;
    let mut dlow = b.zeros(up.rows * up.in_features).unwrap();
    let mut dweight = b.zeros(weights).unwrap();
    let work = Work::over(
        up.rows * up.out_features,
        out_bytes + low_bytes + b_bytes + words(weights),
        low_bytes + words(weights),
    );
    let (name, work) = ("lora_up low_rank_backward", work.with_flops(2 * flops(up)));
    memory(b, visit, name, work, BOTH, move |b| {
        b.low_rank_backward(&mut dlow, &mut dweight, &dout, &low, &matrix, up, 4.0)
    });

    for (name, shape) in [("lora_down", down), ("lora_up", up)] {
        let x = elements::<B, B::Element>(b, shape.rows * shape.in_features, 1.0);
        let dout = elements(b, shape.rows * shape.out_features, 0.1);
        let weights = shape.in_features * shape.out_features;
        let mut dweight = b.zeros(weights).unwrap();
        let [input, _, output] = operands::<B>(shape);
        let wide = shape.rows * shape.in_features.max(shape.out_features);
        let work = Work::over(wide, input + output + words(weights), words(weights));
        let name = format!("{name} weight_gradient");
        let work = work.with_flops(flops(shape));
        memory(b, visit, &name, work, GRADIENT, move |b| {
            b.weight_gradient(&mut dweight, &dout, &x, shape, 1.0)
        });
    }
}
