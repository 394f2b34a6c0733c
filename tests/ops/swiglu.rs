//! SwiGLU and its gradient.

use mp_train::backend::Backend;

use crate::buffer::Act;
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot};

/// Rows and inner_hidden_size; the last ones are cut between threads and fit 16-byte pieces.
const SHAPES: [(usize, usize); 9] = [
    (1, 1),
    (3, 1),
    (1, 3),
    (65, 3),
    (3, 97),
    (97, 65),
    (3, 8),
    (97, 136),
    (2, 20_016),
];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(12);
    for (rows, inner) in SHAPES {
        // Around 0, and out to where the gate is shut in f32.
        for width in [1.0, 80.0] {
            swiglu(b, check, &mut numbers, rows, inner, width);
        }
    }
    saturated(b, check);
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Pairs of gate and value, `[T, F]`.
fn pairs(x: &[f64], inner: usize) -> impl Iterator<Item = (f64, f64)> {
    x.chunks_exact(2 * inner).flat_map(move |row| {
        let (gate, up) = row.split_at(inner);
        gate.iter().copied().zip(up.iter().copied())
    })
}

fn exact(x: &[f64], inner: usize) -> Vec<Exact> {
    let term = |(gate, up): (f64, f64)| {
        Exact::new(gate * sigmoid(gate) * up, {
            // e^-gate is known as well as its exponent.
            let doubt = 2.0 + gate.abs() * sigmoid(-gate);
            (gate * sigmoid(gate) * up).abs() * doubt
        })
    };
    pairs(x, inner).map(term).collect()
}

fn exact_gradient(x: &[f64], dout: &[f64], inner: usize) -> Vec<Exact> {
    let places: Vec<(f64, f64)> = pairs(x, inner).collect();
    let rows = places.chunks_exact(inner).zip(dout.chunks_exact(inner));
    rows.flat_map(|(row, dout)| {
        let terms = || row.iter().zip(dout);
        let gates = terms().map(|(&(gate, up), dout)| {
            let (open, shut) = (sigmoid(gate), sigmoid(-gate));
            let size = (dout * up * open).abs() * (2.0 + gate.abs()) * (1.0 + gate.abs() * shut);
            Exact::new(dout * up * open * (1.0 + gate * shut), size)
        });
        let ups = terms().map(|(&(gate, _), dout)| {
            let value = dout * gate * sigmoid(gate);
            Exact::new(value, value.abs() * (2.0 + gate.abs() * sigmoid(-gate)))
        });
        gates.chain(ups).collect::<Vec<_>>()
    })
    .collect()
}

fn swiglu<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    rows: usize,
    inner: usize,
    width: f64,
) {
    let label = format!("rows {rows}, inner {inner}, |x| < {width}");
    let x = Act::<B>::of(b, &numbers.around(0.0, width, 2 * rows * inner));
    let values = x.values();
    let mut out = Act::<B>::blank(b, rows * inner);
    check.run(b, "swiglu", label.clone(), &[&x], || {
        b.swiglu(&mut out.device, &x.device, rows, inner)
    });
    check.expect(b, &out, || exact(&values, inner));

    let dout = Act::<B>::of(b, &numbers.values(rows * inner));
    let mut dx = Act::<B>::blank(b, 2 * rows * inner);
    let op = "swiglu_backward";
    check.run(b, op, label.clone(), &[&x, &dout], || {
        b.swiglu_backward(&mut dx.device, &dout.device, &x.device, rows, inner)
    });
    let c = dout.values();
    check.expect(b, &dx, || exact_gradient(&values, &c, inner));
    if rows * inner > 97 * 97 || width > 1.0 {
        return;
    }
    let functional = |p: &[Vec<f64>]| -> f64 {
        let terms = pairs(&p[0], inner).zip(&c);
        terms
            .map(|((gate, up), c)| c * gate * sigmoid(gate) * up)
            .sum()
    };
    let own = |b: &B, p: &[Vec<f64>]| {
        let x = Act::<B>::of(b, &p[0]);
        let mut out = Act::<B>::blank(b, rows * inner);
        b.swiglu(&mut out.device, &x.device, rows, inner).unwrap();
        dot(&c, &out.result(b))
    };
    let gradient = dx.result(b);
    check.gradient(b, op, label, &[&values], &[&gradient], functional, own);
}

/// Gates at which the exponential overflows: no NaN, and the limits of the function.
fn saturated<B: Backend>(b: &B, check: &mut Check) {
    let gates = [-60_000.0, -300.0, 0.0, 300.0, 60_000.0];
    let x = Act::<B>::of(b, &[gates, [1.0; 5]].concat());
    let mut out = Act::<B>::blank(b, 5);
    let label = "far out".to_owned();
    check.run(b, "swiglu", label.clone(), &[&x], || {
        b.swiglu(&mut out.device, &x.device, 1, 5)
    });
    let gates = x.values()[..5].to_vec();
    let limits: Vec<Exact> = gates.iter().map(|x| Exact::copy(x.max(0.0))).collect();
    check.expect(b, &out, || limits.clone());
    let dout = Act::<B>::of(b, &[1.0; 5]);
    let mut dx = Act::<B>::blank(b, 10);
    check.run(b, "swiglu_backward", label, &[&x, &dout], || {
        b.swiglu_backward(&mut dx.device, &dout.device, &x.device, 1, 5)
    });
    let slopes = [0.0, 0.0, 0.5, 1.0, 1.0].map(Exact::copy);
    check.expect(b, &dx, || [&slopes[..], &limits].concat());
}
