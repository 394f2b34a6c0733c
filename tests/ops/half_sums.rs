//! Products of halves that are summed in f16, as `Sums::F16` lets GPUs do. The CPU sums in f32 all the same.
//!
//! A rounding to f16 of a value v is off by up to half a step, with a deviation of step / sqrt(12), which is
//! 0.212 * 2^-10 * v on average over where v lies between two powers of two. What is rounded, in the least
//! precise order known of tensor cores, is the sum behind every fourth term; so the exact side lists these
//! sums, and the root of the sum of their squares is what an error is measured by.

use mp_train::backend::{Backend, LinearShape, Sums};

use crate::activation::{gelu_exact, gelu_slope};
use crate::buffer::Act;
use crate::check::Check;
use crate::numbers::{Exact, Numbers};

/// Rows, in_features, out_features. Among them sums as long as those of a model's MLP, which are taken in
/// parts, either way round and added to something; and sizes that are no multiple of anything.
const SIZES: [[usize; 3]; 11] = [
    [1, 72, 264],
    [3, 65, 97],
    [65, 97, 65],
    [97, 136, 72],
    [3, 4096, 72],
    [5, 72, 4096],
    [65, 4160, 72],
    [5, 72, 12_288],
    [3, 13_696, 72],
    [3, 4097, 65],
    [3, 16_384, 72],
];

/// As docs/NUMERICS.md promises: no more terms than these are added before their sum is stored.
const MOST_TERMS: usize = 4_096;
/// Terms that a tensor core adds to its sum at once, at the least.
const AT_ONCE: usize = 4;
/// Deviation of a rounding to f16, by the value.
const DEVIATION: f64 = 0.2123 / 1024.0;
/// Sums of fewer terms say little about how errors grow.
const LONG: usize = 4_096;
/// Errors of long sums, in the root of their mean square, by what their roundings let expect.
const SPREAD: f64 = 1.3;
/// The steepest slope of GELU is less.
const STEEPEST: f64 = 1.13;

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(21);
    for (index, [rows, in_features, out_features]) in SIZES.into_iter().enumerate() {
        let shape = LinearShape {
            rows,
            in_features,
            out_features,
            sums: Sums::F16,
        };
        plain(b, check, &mut numbers, shape, index);
        with_gelu(b, check, &mut numbers, shape, index.is_multiple_of(2));
    }
}

/// The exact sum of terms, of `before` and of `bias`; its magnitude is the root of the sum of the squares of
/// all values that are rounded on the way.
fn summed(terms: &[f64], before: Option<f64>, bias: Option<f64>) -> Exact {
    let pieces = terms.len().div_ceil(MOST_TERMS);
    let piece = match pieces {
        1 => terms.len(),
        _ => terms.len().div_ceil(pieces).next_multiple_of(128),
    };
    let mut squares = 0.0;
    let mut value = before.unwrap_or(0.0) + bias.unwrap_or(0.0);
    for piece in terms.chunks(piece) {
        let mut sum = 0.0;
        for few in piece.chunks(AT_ONCE) {
            sum += few.iter().sum::<f64>();
            squares += sum * sum;
        }
        value += sum;
        // Once times alpha, once for what was there, once for the bias.
        squares += sum * sum + 2.0 * value * value;
    }
    Exact::new(value, squares.sqrt())
}

/// Every output: its terms by row and column, what was there before, its bias.
fn all(
    [rows, cols, terms]: [usize; 3],
    term: impl Fn(usize, usize, usize) -> f64,
    before: Option<&[f64]>,
    bias: Option<&[f64]>,
) -> Vec<Exact> {
    let at = |at: usize| {
        let (row, col) = (at / cols, at % cols);
        let terms: Vec<f64> = (0..terms).map(|i| term(row, col, i)).collect();
        summed(&terms, before.map(|b| b[at]), bias.map(|b| b[col]))
    };
    (0..rows * cols).map(at).collect()
}

/// Whether all errors together are what their roundings let expect: a sum that is not taken in parts is
/// further off than that.
fn spread(check: &mut Check, found: &[f64], exact: &[Exact], terms: usize) {
    if terms < LONG {
        return;
    }
    let mean = |squares: f64| (squares / exact.len() as f64).sqrt();
    let errors = found.iter().zip(exact);
    let errors = mean(
        errors
            .map(|(found, exact)| (found - exact.value).powi(2))
            .sum(),
    );
    let magnitudes = mean(exact.iter().map(|exact| exact.magnitude.powi(2)).sum());
    let ratio = errors / (DEVIATION * magnitudes);
    if ratio > SPREAD || ratio.is_nan() {
        check.fail(&format!("errors are {ratio:.2} times what is expected"));
    }
}

fn plain<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    shape: LinearShape,
    index: usize,
) {
    let LinearShape {
        rows,
        in_features,
        out_features,
        ..
    } = shape;
    let (accumulate, with_bias) = (index % 3 == 1, index.is_multiple_of(2));
    let x = Act::<B>::of(b, &numbers.values(rows * in_features));
    let weight = Act::<B>::of(b, &numbers.values(out_features * in_features));
    let bias = Act::<B>::of(b, &numbers.values(out_features));
    let dout = Act::<B>::of(b, &numbers.values(rows * out_features));
    let (x_values, weight_values) = (x.values(), weight.values());
    let (bias_values, dout_values) = (bias.values(), dout.values());
    let label = format!(
        "{rows} x {in_features} to {out_features}, bias {with_bias}, accumulate {accumulate}"
    );
    let target = |numbers: &mut Numbers, len: usize| match accumulate {
        true => Act::<B>::target(b, &numbers.values(len)),
        false => Act::<B>::blank(b, len),
    };

    let mut out = target(numbers, rows * out_features);
    let before = out.values();
    let op = "linear/f16-sums";
    check.run(b, op, label.clone(), &[&x, &weight, &bias], || {
        let bias = with_bias.then_some(&bias.device);
        let out = &mut out.device;
        b.linear(out, &x.device, &weight.device, bias, shape, 1.0, accumulate)
    });
    let exact = all(
        [rows, out_features, in_features],
        |row, col, i| x_values[row * in_features + i] * weight_values[col * in_features + i],
        accumulate.then_some(&before[..]),
        with_bias.then_some(&bias_values[..]),
    );
    check.expect(b, &out, || exact.clone());
    spread(check, &out.result(b), &exact, in_features);

    let mut dx = target(numbers, rows * in_features);
    let before = dx.values();
    let op = "linear_backward/f16-sums";
    check.run(b, op, label, &[&dout, &weight], || {
        let (dout, weight) = (&dout.device, &weight.device);
        b.linear_backward(&mut dx.device, dout, weight, shape, 1.0, accumulate)
    });
    let exact = all(
        [rows, in_features, out_features],
        |row, col, o| dout_values[row * out_features + o] * weight_values[o * in_features + col],
        accumulate.then_some(&before[..]),
        None,
    );
    check.expect(b, &dx, || exact.clone());
    spread(check, &dx.result(b), &exact, out_features);
}

fn with_gelu<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    shape: LinearShape,
    with_bias: bool,
) {
    let LinearShape {
        rows,
        in_features,
        out_features,
        ..
    } = shape;
    let label = format!("{rows} x {in_features} to {out_features}, bias {with_bias}");
    // So that the input of GELU is about as wide as its bend.
    let width = 3.0 / (in_features as f64).sqrt();
    let x = Act::<B>::of(b, &numbers.values(rows * in_features));
    let weight = Act::<B>::of(b, &numbers.around(0.0, width, out_features * in_features));
    let bias = Act::<B>::of(b, &numbers.values(out_features));
    let (x_values, weight_values, bias_values) = (x.values(), weight.values(), bias.values());
    let mut out = Act::<B>::blank(b, rows * out_features);
    let mut pre = Act::<B>::blank(b, rows * out_features);
    let op = "linear_gelu/f16-sums";
    check.run(b, op, label.clone(), &[&x, &weight, &bias], || {
        let bias = with_bias.then_some(&bias.device);
        let (out, pre) = (&mut out.device, &mut pre.device);
        b.linear_gelu(out, pre, &x.device, &weight.device, bias, shape)
    });
    let sums = all(
        [rows, out_features, in_features],
        |row, col, i| x_values[row * in_features + i] * weight_values[col * in_features + i],
        None,
        with_bias.then_some(&bias_values[..]),
    );
    check.expect(b, &pre, || sums.clone());
    check.expect(b, &out, || {
        let gelu = |pre: &Exact| Exact::new(gelu_exact(pre.value), STEEPEST * pre.magnitude);
        sums.iter().map(gelu).collect()
    });

    let pre = Act::<B>::of(b, &numbers.around(0.0, 3.0, rows * in_features));
    let dout = Act::<B>::of(b, &numbers.values(rows * out_features));
    let (pre_values, dout_values) = (pre.values(), dout.values());
    let mut dpre = Act::<B>::blank(b, rows * in_features);
    let op = "gelu_linear_backward/f16-sums";
    check.run(b, op, label, &[&dout, &weight, &pre], || {
        let (dpre, dout) = (&mut dpre.device, &dout.device);
        b.gelu_linear_backward(dpre, dout, &weight.device, &pre.device, shape)
    });
    let products = all(
        [rows, in_features, out_features],
        |row, col, o| dout_values[row * out_features + o] * weight_values[o * in_features + col],
        None,
        None,
    );
    check.expect(b, &dpre, || {
        let through = |(product, &pre): (&Exact, &f64)| {
            let (slope, size) = gelu_slope(pre);
            // The slope itself is a function of f32, a thousandth of this measure.
            let magnitude = product.magnitude * (slope.abs() + size / 1000.0);
            Exact::new(product.value * slope, magnitude)
        };
        products.iter().zip(&pre_values).map(through).collect()
    });
}
