//! RMS norm and its gradients.

use super::reduce;
use super::threads::Threads;
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
    let rstds = &mut stats[..rows];
    threads.items(rstds, cols, |row, rstd| {
        let mean_square = reduce::sum_squares(&x[row * cols..][..cols], 0.0) / cols as f32;
        *rstd = 1.0 / (mean_square + eps).sqrt();
    });
    let rstds = &*rstds;
    threads.rows(&mut out[..rows * cols], cols, |row, out| {
        for ((out, &x), weight) in out.iter_mut().zip(&x[row * cols..]).zip(weight) {
            *out = E::from_f32(x * rstds[row] * weight.to_f32());
        }
    });
}

/// `dx = residual + rstd * (g - xhat * mean(g xhat))` with `g = dout * weight`.
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
        let (x, rstd) = (&x[row * cols..][..cols], stats[row]);
        let mut g = vec![0.0f32; cols];
        E::widen(&mut g, &dout[row * cols..][..cols]);
        for (g, weight) in g.iter_mut().zip(weight) {
            *g *= weight.to_f32();
        }
        let gx_mean = reduce::dot(&g, x) * rstd / cols as f32;
        for (g, &x) in g.iter_mut().zip(x) {
            *g = rstd * (*g - x * rstd * gx_mean);
        }
        if let Some(residual) = residual {
            for (g, residual) in g.iter_mut().zip(&residual[row * cols..]) {
                *g += residual.to_f32();
            }
        }
        for (dx, &g) in dx.iter_mut().zip(&g) {
            *dx = E::from_f32(g);
        }
    });
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
        for (row, rstd) in stats[..rows].iter().enumerate() {
            for (col, dweight) in (start..).zip(dweight.iter_mut()) {
                let place = row * cols + col;
                *dweight += dout[place].to_f32() * x[place] * rstd;
            }
        }
    });
}
