//! Layer norm and its gradients.

use multiversion::multiversion;

use super::Cpu;
use super::reduce;
use super::threads::{Scattered, Threads, with_scratch};
use crate::backend::{Element, NormShape, RowGradient};

/// A gradient in host memory: `dout + alpha * residual`.
#[derive(Clone, Copy)]
pub struct Gradient<'a, E> {
    /// Through the branch.
    pub dout: &'a [E],
    /// Along the residual.
    pub residual: Option<(&'a [E], f32)>,
}

impl<'a, E: Element> Gradient<'a, E> {
    /// That of the CPU's buffers.
    pub fn of(dout: RowGradient<'a, Cpu<E>>) -> Self {
        Gradient {
            dout: dout.dout,
            residual: dout.residual.map(|(values, alpha)| (&values[..], alpha)),
        }
    }

    /// The values from `start` on.
    #[inline(always)]
    pub fn row(&self, out: &mut [f32], start: usize) {
        for (out, dout) in out.iter_mut().zip(&self.dout[start..]) {
            *out = dout.to_f32();
        }
        if let Some((residual, alpha)) = self.residual {
            for (out, residual) in out.iter_mut().zip(&residual[start..]) {
                *out += alpha * residual.to_f32();
            }
        }
    }
}

pub fn layer_norm<E: Element>(
    threads: &Threads,
    out: &mut [E],
    stats: &mut [f32],
    x: &[f32],
    weight: &[E],
    bias: &[E],
    shape: NormShape,
) {
    let NormShape { rows, cols, eps } = shape;
    let stats = Scattered::new(&mut stats[..2 * rows]);
    threads.rows(&mut out[..rows * cols], cols, |row, out| {
        let x = &x[row * cols..][..cols];
        let (mean, rstd) = layer_norm_row(out, x, &weight[..cols], &bias[..cols], eps);
        // SAFETY: each row has two places of its own.
        unsafe { stats.at(row, 1) }.fill(mean);
        // SAFETY: as above.
        unsafe { stats.at(rows + row, 1) }.fill(rstd);
    });
}

/// The mean of the row and its rstd.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn layer_norm_row<E: Element>(
    out: &mut [E],
    x: &[f32],
    weight: &[E],
    bias: &[E],
    eps: f32,
) -> (f32, f32) {
    let width = x.len() as f32;
    let mean = reduce::sum(x) / width;
    let variance = reduce::sum_squares(x, mean) / width;
    let rstd = 1.0 / (variance + eps).sqrt();
    for (((out, &x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
        *out = E::from_f32((x - mean) * rstd * weight.to_f32() + bias.to_f32());
    }
    (mean, rstd)
}

pub fn layer_norm_backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: Gradient<'_, E>,
    x: &[f32],
    stats: &[f32],
    weight: &[E],
    shape: NormShape,
) {
    let NormShape { rows, cols, .. } = shape;
    threads.rows(&mut dx[..rows * cols], cols, |row, dx| {
        with_scratch(2 * cols, |scratch| {
            let (g, xhat) = scratch.split_at_mut(cols);
            let stats = (stats[row], stats[rows + row]);
            let first = row * cols;
            layer_norm_backward_row(dx, g, xhat, dout, &x[first..], stats, weight, first);
        });
    });
}

/// `dx = rstd * (g - mean(g) - xhat * mean(g xhat))` with `g = dout * weight`; the row starts at `first`
/// in `dout`.
#[allow(clippy::too_many_arguments)]
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn layer_norm_backward_row<E: Element>(
    dx: &mut [E],
    g: &mut [f32],
    xhat: &mut [f32],
    dout: Gradient<'_, E>,
    x: &[f32],
    (mean, rstd): (f32, f32),
    weight: &[E],
    first: usize,
) {
    let width = dx.len() as f32;
    dout.row(g, first);
    for (g, weight) in g.iter_mut().zip(weight) {
        *g *= weight.to_f32();
    }
    for (xhat, x) in xhat.iter_mut().zip(x) {
        *xhat = (x - mean) * rstd;
    }
    let g_mean = reduce::sum(g) / width;
    let gx_mean = reduce::dot(g, xhat) / width;
    for ((dx, &g), &xhat) in dx.iter_mut().zip(&*g).zip(&*xhat) {
        *dx = E::from_f32(rstd * (g - g_mean - xhat * gx_mean));
    }
}

pub fn layer_norm_weight_gradient<E: Element>(
    threads: &Threads,
    dweight: &mut [f32],
    dbias: &mut [f32],
    dout: Gradient<'_, E>,
    x: &[f32],
    stats: &[f32],
    shape: NormShape,
) {
    let NormShape { rows, cols, .. } = shape;
    let dbias = Scattered::new(&mut dbias[..cols]);
    threads.pieces(&mut dweight[..cols], |start, dweight| {
        let width = dweight.len();
        // SAFETY: pieces do not overlap.
        let dbias = unsafe { dbias.at(start, width) };
        with_scratch(width, |gradient| {
            for row in 0..rows {
                let first = row * cols + start;
                let stats = (stats[row], stats[rows + row]);
                dout.row(gradient, first);
                add_weight_gradient(dweight, dbias, gradient, &x[first..], stats);
            }
        });
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn add_weight_gradient(
    dweight: &mut [f32],
    dbias: &mut [f32],
    dout: &[f32],
    x: &[f32],
    (mean, rstd): (f32, f32),
) {
    for (((dweight, dbias), dout), x) in dweight.iter_mut().zip(dbias).zip(dout).zip(x) {
        *dweight += dout * (x - mean) * rstd;
        *dbias += dout;
    }
}

/// `sums[c] += sum over rows of x[row, c]`, rows ascending.
pub fn column_sums<E: Element>(
    threads: &Threads,
    sums: &mut [f32],
    x: &[E],
    rows: usize,
    cols: usize,
) {
    threads.pieces(&mut sums[..cols], |start, sums| {
        for row in 0..rows {
            add_row(sums, &x[row * cols + start..]);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn add_row<E: Element>(sums: &mut [f32], x: &[E]) {
    for (sum, x) in sums.iter_mut().zip(x) {
        *sum += x.to_f32();
    }
}
