//! RMS norm and its gradients.

use multiversion::multiversion;

use super::reduce;
use super::threads::{Scattered, Threads, with_scratch};
use crate::backend::{Element, NormShape};

pub fn rms_norm<E: Element>(
    threads: &Threads,
    out: &mut [E],
    stats: &mut [f32],
    x: &[f32],
    weight: &[E],
    shape: NormShape,
) {
    let NormShape { rows, cols, eps } = shape;
    let stats = Scattered::new(&mut stats[..rows]);
    threads.rows(&mut out[..rows * cols], cols, |row, out| {
        let rstd = rms_norm_row(out, &x[row * cols..][..cols], &weight[..cols], eps);
        // SAFETY: each row writes its own place.
        unsafe { stats.at(row, 1) }.fill(rstd);
    });
}

/// The rstd of the row.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn rms_norm_row<E: Element>(out: &mut [E], x: &[f32], weight: &[E], eps: f32) -> f32 {
    let mean_square = reduce::sum_squares(x, 0.0) / x.len() as f32;
    let rstd = 1.0 / (mean_square + eps).sqrt();
    for ((out, &x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = E::from_f32(x * rstd * weight.to_f32());
    }
    rstd
}

#[allow(clippy::too_many_arguments)]
pub fn backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: &[E],
    residual: Option<&[E]>,
    x: &[f32],
    stats: &[f32],
    weight: &[E],
    shape: NormShape,
) {
    let NormShape { rows, cols, .. } = shape;
    threads.rows(&mut dx[..rows * cols], cols, |row, dx| {
        let part = row * cols..(row + 1) * cols;
        let residual = residual.map(|residual| &residual[part.clone()]);
        let (dout, x) = (&dout[part.clone()], &x[part]);
        with_scratch(cols, |g| {
            backward_row(dx, g, dout, residual, x, stats[row], weight);
        });
    });
}

/// `dx = residual + rstd * (g - xhat * mean(g xhat))` with `g = dout * weight`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn backward_row<E: Element>(
    dx: &mut [E],
    g: &mut [f32],
    dout: &[E],
    residual: Option<&[E]>,
    x: &[f32],
    rstd: f32,
    weight: &[E],
) {
    for ((g, dout), weight) in g.iter_mut().zip(dout).zip(weight) {
        *g = dout.to_f32() * weight.to_f32();
    }
    let gx_mean = reduce::dot(g, x) * rstd / x.len() as f32;
    for (g, &x) in g.iter_mut().zip(x) {
        *g = rstd * (*g - x * rstd * gx_mean);
    }
    if let Some(residual) = residual {
        for (g, residual) in g.iter_mut().zip(residual) {
            *g += residual.to_f32();
        }
    }
    for (dx, &g) in dx.iter_mut().zip(&*g) {
        *dx = E::from_f32(g);
    }
}

pub fn weight_gradient<E: Element>(
    threads: &Threads,
    dweight: &mut [f32],
    dout: &[E],
    x: &[f32],
    stats: &[f32],
    shape: NormShape,
) {
    let NormShape { rows, cols, .. } = shape;
    threads.pieces(&mut dweight[..cols], |start, dweight| {
        for (row, &rstd) in stats[..rows].iter().enumerate() {
            let first = row * cols + start;
            add_weight_gradient(dweight, &dout[first..], &x[first..], rstd);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn add_weight_gradient<E: Element>(dweight: &mut [f32], dout: &[E], x: &[f32], rstd: f32) {
    for ((dweight, dout), x) in dweight.iter_mut().zip(dout).zip(x) {
        *dweight += dout.to_f32() * x * rstd;
    }
}
