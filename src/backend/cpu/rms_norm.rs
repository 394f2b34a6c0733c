//! RMS norm and its gradients.

use super::norm::Gradient;
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

/// `dx = rstd * (g - xhat * mean(g xhat))` with `g = dout * weight`, added to `dx` when `accumulate`.
#[allow(clippy::too_many_arguments)]
pub fn backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: Gradient<'_, E>,
    x: &[f32],
    stats: &[f32],
    weight: &[E],
    shape: NormShape,
    accumulate: bool,
) {
    let NormShape { rows, cols, .. } = shape;
    threads.rows(&mut dx[..rows * cols], cols, |row, dx| {
        let (x, rstd) = (&x[row * cols..][..cols], stats[row]);
        let mut g = vec![0.0f32; cols];
        dout.row(&mut g, row * cols);
        for (g, weight) in g.iter_mut().zip(weight) {
            *g *= weight.to_f32();
        }
        let gx_mean = reduce::dot(&g, x) * rstd / cols as f32;
        for ((dx, &g), &x) in dx.iter_mut().zip(&g).zip(x) {
            let along = if accumulate { dx.to_f32() } else { 0.0 };
            *dx = E::from_f32(along + rstd * (g - x * rstd * gx_mean));
        }
    });
}

pub fn weight_gradient<E: Element>(
    threads: &Threads,
    dweight: &mut [f32],
    dout: Gradient<'_, E>,
    x: &[f32],
    stats: &[f32],
    shape: NormShape,
) {
    let NormShape { rows, cols, .. } = shape;
    threads.pieces(&mut dweight[..cols], |start, dweight| {
        for (row, rstd) in stats[..rows].iter().enumerate() {
            for (col, dweight) in (start..).zip(dweight.iter_mut()) {
                let place = row * cols + col;
                *dweight += dout.at(place) * x[place] * rstd;
            }
        }
    });
}
