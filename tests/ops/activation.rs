//! GELU and tanh.

use mp_train::backend::Backend;

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot};

const C: f64 = 0.797_884_560_802_865_4;

/// The last one is cut between threads.
const LENGTHS: [usize; 5] = [1, 3, 65, 97, 40_001];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(8);
    for len in LENGTHS {
        // Around 0, and out to where tanh is 1 in f32.
        for width in [1.0, 12.0] {
            gelu(b, check, &mut numbers, len, width);
            tanh(b, check, &mut numbers, len, width);
        }
    }
    saturated(b, check);
}

pub fn gelu_exact(x: f64) -> f64 {
    0.5 * x * (1.0 + (C * x * (1.0 + 0.044_715 * x * x)).tanh())
}

/// The derivative, and the size of what is added up in it.
pub fn gelu_slope(x: f64) -> (f64, f64) {
    let t = (C * x * (1.0 + 0.044_715 * x * x)).tanh();
    let inner = C * (1.0 + 3.0 * 0.044_715 * x * x);
    let value = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner;
    (value, 1.0 + x.abs() * inner)
}

fn gelu<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize, width: f64) {
    let label = format!("len {len}, |x| < {width}");
    let x = Act::<B>::of(b, &numbers.around(0.0, width, len));
    let values = x.values();
    let mut out = Act::<B>::blank(b, len);
    check.run(b, "gelu", label.clone(), &[&x], || {
        b.gelu(&mut out.device, &x.device, len)
    });
    check.expect(b, &out, || {
        let exact = values.iter().map(|&x| Exact::new(gelu_exact(x), x.abs()));
        exact.collect()
    });

    let mut dx = Act::<B>::target(b, &numbers.values(len));
    let c = dx.values();
    check.run(b, "gelu_backward", label.clone(), &[&x], || {
        b.gelu_backward(&mut dx.device, &x.device, len)
    });
    check.expect(b, &dx, || {
        let pairs = values.iter().zip(&c);
        pairs
            .map(|(&x, c)| {
                let (slope, size) = gelu_slope(x);
                Exact::new(c * slope, c.abs() * size)
            })
            .collect()
    });
    if len > 97 || width > 1.0 {
        return;
    }
    let functional =
        |p: &[Vec<f64>]| -> f64 { p[0].iter().zip(&c).map(|(&x, c)| c * gelu_exact(x)).sum() };
    let own = |b: &B, p: &[Vec<f64>]| {
        let x = Act::<B>::of(b, &p[0]);
        let mut out = Act::<B>::blank(b, len);
        b.gelu(&mut out.device, &x.device, len).unwrap();
        dot(&c, &out.result(b))
    };
    let gradient = dx.result(b);
    let op = "gelu_backward";
    check.gradient(b, op, label, &[&values], &[&gradient], functional, own);
}

fn tanh<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize, width: f64) {
    let label = format!("len {len}, |x| < {width}");
    let mut x = Buf::<B, f32>::target(b, &numbers.around(0.0, width, len));
    let values = x.values();
    check.run(b, "tanh", label.clone(), &[], || b.tanh(&mut x.device, len));
    check.expect(b, &x, || {
        let exact = values.iter().map(|x| Exact::new(x.tanh(), x.tanh().abs()));
        exact.collect()
    });

    let out: Vec<f64> = values.iter().map(|x| x.tanh()).collect();
    let out = Buf::<B, f32>::of(b, &out);
    let mut dx = Buf::<B, f32>::target(b, &numbers.values(len));
    let (c, out_values) = (dx.values(), out.values());
    check.run(b, "tanh_backward", label.clone(), &[&out], || {
        b.tanh_backward(&mut dx.device, &out.device, len)
    });
    check.expect(b, &dx, || {
        let pairs = out_values.iter().zip(&c);
        pairs
            .map(|(out, c)| Exact::new(c * (1.0 - out * out), c.abs() * (1.0 + out * out)))
            .collect()
    });
    if len > 97 || width > 1.0 {
        return;
    }
    let functional =
        |p: &[Vec<f64>]| -> f64 { p[0].iter().zip(&c).map(|(x, c)| c * x.tanh()).sum() };
    let own = |b: &B, p: &[Vec<f64>]| {
        let mut x = Buf::<B, f32>::target(b, &p[0]);
        b.tanh(&mut x.device, len).unwrap();
        dot(&c, &x.result(b))
    };
    let gradient = dx.result(b);
    let op = "tanh_backward";
    check.gradient(b, op, label, &[&values], &[&gradient], functional, own);
}

/// Values at which the cube or the exponential overflows: no NaN, and the limits of the functions.
fn saturated<B: Backend>(b: &B, check: &mut Check) {
    let points = [-60_000.0, -300.0, -40.0, 0.0, 40.0, 300.0, 60_000.0];
    let len = points.len();
    let x = Act::<B>::of(b, &points);
    let values = x.values();
    let mut out = Act::<B>::blank(b, len);
    check.run(b, "gelu", "far out".to_owned(), &[&x], || {
        b.gelu(&mut out.device, &x.device, len)
    });
    check.expect(b, &out, || {
        values.iter().map(|x| Exact::copy(x.max(0.0))).collect()
    });
    let mut dx = Act::<B>::target(b, &vec![1.0; len]);
    check.run(b, "gelu_backward", "far out".to_owned(), &[&x], || {
        b.gelu_backward(&mut dx.device, &x.device, len)
    });
    let slopes = [0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0];
    check.expect(b, &dx, || slopes.map(Exact::copy).to_vec());
    let mut x = Buf::<B, f32>::target(b, &points);
    check.run(b, "tanh", "far out".to_owned(), &[], || {
        b.tanh(&mut x.device, len)
    });
    let limits = points.map(|x: f64| if x == 0.0 { 0.0 } else { x.signum() });
    check.expect(b, &x, || limits.map(Exact::copy).to_vec());
}
