//! Both gradients of a low-rank product in one pass.

use mp_train::backend::{Backend, LinearShape, Sums};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot};

/// Rows, rank, outputs: ranks that have a kernel and others, outputs that are multiples of 8 and others, on
/// both sides of tiles of 128 rows and 64 columns and of chunks of 256 rows and 512 columns.
const SIZES: [[usize; 3]; 14] = [
    [1, 1, 1],
    [3, 65, 97],
    [97, 3, 65],
    [65, 8, 97],
    [1, 8, 8],
    [3, 8, 64],
    [65, 8, 72],
    [129, 8, 136],
    [257, 8, 520],
    [515, 8, 1032],
    [97, 16, 72],
    [258, 16, 584],
    [300, 32, 264],
    [1, 16, 1096],
];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(16);
    for (index, [rows, rank, outputs]) in SIZES.into_iter().enumerate() {
        let shape = LinearShape {
            rows,
            in_features: rank,
            out_features: outputs,
            sums: Sums::F32,
        };
        let scale = if index % 2 == 0 { 4.0 } else { -1.7 };
        gradients(b, check, &mut numbers, shape, scale);
    }
}

fn gradients<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    shape: LinearShape,
    scale: f32,
) {
    let LinearShape {
        rows,
        in_features: rank,
        out_features: outputs,
        ..
    } = shape;
    let factor = f64::from(scale);
    let dout = Act::<B>::of(b, &numbers.values(rows * outputs));
    let low = Act::<B>::of(b, &numbers.values(rows * rank));
    let weight = Act::<B>::of(b, &numbers.values(outputs * rank));
    let (c, low_values, weight_values) = (dout.values(), low.values(), weight.values());
    let mut dlow = Act::<B>::blank(b, rows * rank);
    let mut dweight = Buf::<B, f32>::target(b, &numbers.values(outputs * rank));
    let before = dweight.values();
    let op = "low_rank_backward";
    let label = format!("{rows} x {rank} to {outputs}, scale {scale}");
    check.run(b, op, label.clone(), &[&dout, &low, &weight], || {
        b.low_rank_backward(
            &mut dlow.device,
            &mut dweight.device,
            &dout.device,
            &low.device,
            &weight.device,
            shape,
            scale,
        )
    });
    check.expect(b, &dlow, || {
        let at = |at: usize| {
            let (row, r) = (at / rank, at % rank);
            let term = |o| factor * c[row * outputs + o] * weight_values[o * rank + r];
            Exact::sum((0..outputs).map(term))
        };
        (0..rows * rank).map(at).collect()
    });
    check.expect(b, &dweight, || {
        let at = |at: usize| {
            let (o, r) = (at / rank, at % rank);
            let term = |row| factor * c[row * outputs + o] * low_values[row * rank + r];
            Exact::sum((0..rows).map(term).chain([before[at]]))
        };
        (0..outputs * rank).map(at).collect()
    });

    if rows * rank * outputs > 150_000 {
        return;
    }
    let functional = |low: &[f64], weight: &[f64]| -> f64 {
        let at = |at: usize| {
            let (row, o) = (at / outputs, at % outputs);
            let term = |r| low[row * rank + r] * weight[o * rank + r];
            c[at] * factor * (0..rank).map(term).sum::<f64>()
        };
        (0..rows * outputs).map(at).sum()
    };
    let own = |b: &B, low: &[f64], weight: &[f64]| {
        let (low, weight) = (Act::<B>::of(b, low), Act::<B>::of(b, weight));
        let mut out = Act::<B>::blank(b, rows * outputs);
        let (low, weight) = (&low.device, &weight.device);
        b.linear(&mut out.device, low, weight, None, shape, scale, false)
            .unwrap();
        dot(&c, &out.result(b))
    };
    let after = dweight.result(b);
    let added: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
    check.gradient(
        b,
        op,
        label,
        &[&low_values, &weight_values],
        &[&dlow.result(b), &added],
        |p| functional(&p[0], &p[1]),
        |b, p| own(b, &p[0], &p[1]),
    );
}
