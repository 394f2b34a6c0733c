//! Products with GELU behind or in front of them.

use mp_train::backend::{Backend, Element, LinearShape, Sums};

use crate::activation::{gelu_exact, gelu_slope};
use crate::buffer::Act;
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot, values};

/// Rows, in_features, out_features. Rows of multiples of 8 values, which cuBLASLt's epilogue takes, and
/// others; more than one bucket of rows.
const SIZES: [[usize; 3]; 12] = [
    [1, 1, 1],
    [3, 65, 97],
    [97, 3, 65],
    [65, 97, 3],
    [1, 72, 264],
    [3, 264, 72],
    [65, 72, 136],
    [97, 136, 72],
    [130, 96, 65],
    [130, 65, 96],
    [257, 104, 520],
    [64, 80, 80],
];

/// The steepest slope of GELU is less.
const STEEPEST: f64 = 1.13;

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(14);
    for (index, sizes) in SIZES.into_iter().enumerate() {
        for with_bias in [true, index % 2 == 0] {
            shape(b, check, &mut numbers, sizes, with_bias);
        }
    }
}

/// What is lost where a product is rounded to the storage type before GELU, or its slope, is taken of it:
/// half a step of the product at most, times the slope. That is a bound of rounding, and not of noise: on
/// devices that take two ops (the CPU; a GPU whose library has no algorithm for the shape) single values
/// come as close to it as they lie to a power of two.
fn rounded_on_the_way<B: Backend>(product: f64, slope: f64) -> f64 {
    let unit = match <B::Element as Element>::NAME {
        "f16" => 2.0_f64.powi(-11),
        _ => 2.0_f64.powi(-24),
    };
    unit * product.abs() * slope.abs()
}

fn shape<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    [rows, in_features, out_features]: [usize; 3],
    with_bias: bool,
) {
    let shape = LinearShape {
        rows,
        in_features,
        out_features,
        sums: Sums::F32,
    };
    let label = format!("{rows} x {in_features} to {out_features}, bias {with_bias}");
    // So that the input of GELU is about as wide as its bend.
    let width = 3.0 / (in_features as f64).sqrt();
    let x = Act::<B>::of(b, &numbers.values(rows * in_features));
    let weight = Act::<B>::of(b, &numbers.around(0.0, width, out_features * in_features));
    let bias = Act::<B>::of(b, &numbers.values(out_features));
    let (x_values, weight_values, bias_values) = (x.values(), weight.values(), bias.values());
    let exact_pre = |x: &[f64]| -> Vec<Exact> {
        let at = |at: usize| {
            let (row, col) = (at / out_features, at % out_features);
            let terms = (0..in_features)
                .map(|i| x[row * in_features + i] * weight_values[col * in_features + i]);
            Exact::sum(terms.chain(with_bias.then_some(bias_values[col])))
        };
        (0..rows * out_features).map(at).collect()
    };
    let sums = exact_pre(&x_values);

    let mut out = Act::<B>::blank(b, rows * out_features);
    let mut pre = Act::<B>::blank(b, rows * out_features);
    let op = "linear_gelu";
    check.run(b, op, label.clone(), &[&x, &weight, &bias], || {
        b.linear_gelu(
            &mut out.device,
            &mut pre.device,
            &x.device,
            &weight.device,
            with_bias.then_some(&bias.device),
            shape,
        )
    });
    check.expect(b, &pre, || sums.clone());
    check.expect(b, &out, || {
        let gelu = |pre: &Exact| {
            let magnitude = STEEPEST * pre.magnitude + pre.value.abs();
            Exact::new(gelu_exact(pre.value), magnitude)
                .losing(rounded_on_the_way::<B>(pre.value, STEEPEST))
        };
        sums.iter().map(gelu).collect()
    });

    let pre = Act::<B>::of(b, &numbers.around(0.0, 3.0, rows * in_features));
    let dout = Act::<B>::of(b, &numbers.values(rows * out_features));
    let (pre_values, dout_values) = (pre.values(), dout.values());
    let mut dpre = Act::<B>::blank(b, rows * in_features);
    let op = "gelu_linear_backward";
    check.run(b, op, label.clone(), &[&dout, &weight, &pre], || {
        b.gelu_linear_backward(
            &mut dpre.device,
            &dout.device,
            &weight.device,
            &pre.device,
            shape,
        )
    });
    check.expect(b, &dpre, || {
        let at = |at: usize| {
            let (row, col) = (at / in_features, at % in_features);
            let terms = (0..out_features).map(|o| {
                dout_values[row * out_features + o] * weight_values[o * in_features + col]
            });
            let product = Exact::sum(terms);
            let (slope, size) = gelu_slope(pre_values[at]);
            Exact::new(product.value * slope, product.magnitude * size)
                .losing(rounded_on_the_way::<B>(product.value, slope))
        };
        (0..rows * in_features).map(at).collect()
    });

    if with_bias || rows * in_features * out_features > 700_000 {
        return;
    }
    let functional = |pre: &[f64]| {
        let activated: Vec<f64> = pre.iter().map(|&x| gelu_exact(x)).collect();
        dot(&dout_values, &values(&exact_pre(&activated)))
    };
    let own = |b: &B, pre: &[f64]| {
        let pre = Act::<B>::of(b, pre);
        let mut activated = Act::<B>::blank(b, rows * in_features);
        b.gelu(&mut activated.device, &pre.device, rows * in_features)
            .unwrap();
        let mut out = Act::<B>::blank(b, rows * out_features);
        let (x, weight) = (&activated.device, &weight.device);
        b.linear(&mut out.device, x, weight, None, shape, 1.0, false)
            .unwrap();
        dot(&dout_values, &out.result(b))
    };
    let gradient = dpre.result(b);
    check.gradient(
        b,
        op,
        label,
        &[&pre_values],
        &[&gradient],
        |p| functional(&p[0]),
        |b, p| own(b, &p[0]),
    );
}
