//! Matrix products.

use mp_train::backend::{Backend, Element, LinearShape, Sums};

use crate::buffer::Buf;
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot, values};

const SIZES: [usize; 4] = [1, 3, 65, 97];

/// Sizes on both sides of tiles of 128 rows and 512 columns (and of larger ones), and a sum longer
/// than a cache block.
const LARGE: [[usize; 3]; 6] = [
    [513, 33, 130],
    [129, 65, 513],
    [257, 97, 3],
    [3, 97, 1025],
    [65, 1031, 97],
    [128, 512, 512],
];

/// Products as LoRA has them: few features on one side, on the other a multiple of 8, so that rows can
/// be loaded 16 bytes at a time; on both sides of the ranks and tiles of kernels/adapter.cu. Rows, the
/// few, the many.
const LOW_RANK: [[usize; 3]; 12] = [
    [1, 2, 8],
    [3, 8, 264],
    [17, 8, 1032],
    [130, 4, 40],
    [97, 10, 72],
    [65, 16, 328],
    [33, 18, 520],
    [129, 32, 72],
    [3, 34, 1032],
    [70, 64, 264],
    [257, 64, 64],
    [150, 66, 136],
];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    all::<B, f32>(b, check);
    if <B::Element as Element>::NAME != f32::NAME {
        all::<B, B::Element>(b, check);
    }
}

fn all<B: Backend, T: Element>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(4);
    for rows in SIZES {
        for in_features in SIZES {
            for out_features in SIZES {
                // Neighbouring cases differ in what else there is.
                let variant = numbers.below(8);
                shape::<B, T>(
                    b,
                    check,
                    &mut numbers,
                    [rows, in_features, out_features],
                    variant,
                );
            }
        }
    }
    for (index, sizes) in LARGE.into_iter().enumerate() {
        shape::<B, T>(b, check, &mut numbers, sizes, index);
    }
    for (index, [rows, few, many]) in LOW_RANK.into_iter().enumerate() {
        for (sizes, variant) in [([rows, few, many], index), ([rows, many, few], index + 4)] {
            // Bias aside: with one the product is not a LoRA's.
            shape::<B, T>(b, check, &mut numbers, sizes, variant & !2);
        }
    }
    for variant in 0..8 {
        shape::<B, T>(b, check, &mut numbers, [65, 97, 65], variant);
    }
}

/// The exact `scale * x weightᵀ + bias + before`.
fn linear(
    x: &[f64],
    weight: &[f64],
    bias: Option<&[f64]>,
    before: Option<&[f64]>,
    shape: LinearShape,
    scale: f64,
) -> Vec<Exact> {
    let (inner, outer) = (shape.in_features, shape.out_features);
    (0..shape.rows * outer)
        .map(|at| {
            let (row, col) = (at / outer, at % outer);
            let products = (0..inner).map(|i| scale * x[row * inner + i] * weight[col * inner + i]);
            let rest = [bias.map(|bias| bias[col]), before.map(|before| before[at])];
            Exact::sum(products.chain(rest.into_iter().flatten()))
        })
        .collect()
}

fn shape<B: Backend, T: Element>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    [rows, in_features, out_features]: [usize; 3],
    variant: usize,
) {
    let shape = LinearShape {
        rows,
        in_features,
        out_features,
        sums: Sums::F32,
    };
    let (accumulate, with_bias) = (variant & 1 != 0, variant & 2 != 0);
    let scale = if variant & 4 != 0 { 1.0f32 } else { -1.7 };
    let factor = f64::from(scale);
    let x = Buf::<B, T>::of(b, &numbers.values(rows * in_features));
    let weight = Buf::<B, T>::of(b, &numbers.values(out_features * in_features));
    let bias = Buf::<B, T>::of(b, &numbers.values(out_features));
    let dout = Buf::<B, T>::of(b, &numbers.values(rows * out_features));
    let (x_values, weight_values) = (x.values(), weight.values());
    let (bias_values, dout_values) = (bias.values(), dout.values());
    let bias = with_bias.then_some(&bias.device);
    let label = format!(
        "{rows} x {in_features} to {out_features} in {}, scale {scale}, bias {with_bias}, \
         accumulate {accumulate}",
        T::NAME
    );
    let target = |numbers: &mut Numbers, len: usize| {
        if accumulate {
            Buf::<B, T>::target(b, &numbers.values(len))
        } else {
            Buf::<B, T>::blank(b, len)
        }
    };

    let mut out = target(numbers, rows * out_features);
    let before = out.values();
    check.run(b, "linear", label.clone(), &[&x, &weight], || {
        b.linear(
            &mut out.device,
            &x.device,
            &weight.device,
            bias,
            shape,
            scale,
            accumulate,
        )
    });
    check.expect(b, &out, || {
        let bias = with_bias.then_some(&bias_values[..]);
        let before = accumulate.then_some(&before[..]);
        linear(&x_values, &weight_values, bias, before, shape, factor)
    });

    let mut dx = target(numbers, rows * in_features);
    let before = dx.values();
    check.run(
        b,
        "linear_backward",
        label.clone(),
        &[&dout, &weight],
        || {
            b.linear_backward(
                &mut dx.device,
                &dout.device,
                &weight.device,
                shape,
                scale,
                accumulate,
            )
        },
    );
    check.expect(b, &dx, || {
        (0..rows * in_features)
            .map(|at| {
                let (row, col) = (at / in_features, at % in_features);
                let products = (0..out_features).map(|o| {
                    let weight = weight_values[o * in_features + col];
                    factor * dout_values[row * out_features + o] * weight
                });
                Exact::sum(products.chain(accumulate.then_some(before[at])))
            })
            .collect()
    });

    let mut dweight = Buf::<B, f32>::target(b, &numbers.values(out_features * in_features));
    let before = dweight.values();
    check.run(b, "weight_gradient", label.clone(), &[&dout, &x], || {
        b.weight_gradient(&mut dweight.device, &dout.device, &x.device, shape, scale)
    });
    check.expect(b, &dweight, || {
        (0..out_features * in_features)
            .map(|at| {
                let (o, i) = (at / in_features, at % in_features);
                let products = (0..rows).map(|row| {
                    let dout = dout_values[row * out_features + o];
                    factor * dout * x_values[row * in_features + i]
                });
                Exact::sum(products.chain([before[at]]))
            })
            .collect()
    });

    let mut dbias = Buf::<B, f32>::target(b, &numbers.values(out_features));
    let before = dbias.values();
    check.run(b, "bias_gradient", label.clone(), &[&dout], || {
        b.bias_gradient(&mut dbias.device, &dout.device, shape)
    });
    check.expect(b, &dbias, || {
        (0..out_features)
            .map(|o| {
                let column = (0..rows).map(|row| dout_values[row * out_features + o]);
                Exact::sum(column.chain([before[o]]))
            })
            .collect()
    });

    // Gradients: without accumulation, and small enough for many forward passes.
    if accumulate || rows * in_features * out_features > 30_000 {
        return;
    }
    let mut dweight = Buf::<B, f32>::target(b, &vec![0.0; out_features * in_features]);
    b.weight_gradient(&mut dweight.device, &dout.device, &x.device, shape, scale)
        .unwrap();
    let mut dbias = Buf::<B, f32>::target(b, &vec![0.0; out_features]);
    b.bias_gradient(&mut dbias.device, &dout.device, shape)
        .unwrap();
    let (dx, dweight, dbias) = (dx.result(b), dweight.result(b), dbias.result(b));

    let functional = |x: &[f64], weight: &[f64], bias: &[f64]| {
        let out = linear(x, weight, Some(bias), None, shape, factor);
        dot(&dout_values, &values(&out))
    };
    let own = |b: &B, x: &[f64], weight: &[f64], bias: &[f64]| {
        let (x, weight) = (Buf::<B, T>::of(b, x), Buf::<B, T>::of(b, weight));
        let bias = Buf::<B, T>::of(b, bias);
        let mut out = Buf::<B, T>::blank(b, rows * out_features);
        let bias = Some(&bias.device);
        b.linear(
            &mut out.device,
            &x.device,
            &weight.device,
            bias,
            shape,
            scale,
            false,
        )
        .unwrap();
        dot(&dout_values, &out.result(b))
    };
    // A backend's own differences only make sense at f32, whatever the backend stores.
    let coarse = T::NAME != f32::NAME;
    let own = |b: &B, x: &[f64], weight: &[f64], bias: &[f64]| {
        assert!(!coarse, "differences of a coarse forward pass");
        own(b, x, weight, bias)
    };
    check.gradient(
        b,
        "linear_backward",
        label.clone(),
        &[&x_values],
        &[&dx],
        |p| functional(&p[0], &weight_values, &bias_values),
        |b, p| own(b, &p[0], &weight_values, &bias_values),
    );
    check.gradient(
        b,
        "weight_gradient",
        label.clone(),
        &[&weight_values],
        &[&dweight],
        |p| functional(&x_values, &p[0], &bias_values),
        |b, p| own(b, &x_values, &p[0], &bias_values),
    );
    check.gradient(
        b,
        "bias_gradient",
        label,
        &[&bias_values],
        &[&dbias],
        |p| functional(&x_values, &weight_values, &p[0]),
        |b, p| own(b, &x_values, &weight_values, &p[0]),
    );
}
