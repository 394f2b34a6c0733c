//! Layer norm and its gradients.

use super::reduce;
use super::threads::Threads;
use crate::backend::{Element, NormShape};

/// A gradient in host memory: `dout + alpha * residual`.
#[derive(Clone, Copy)]
pub struct Gradient<'a, E> {
    /// Through the branch.
    pub dout: &'a [E],
    /// Along the residual.
    pub residual: Option<(&'a [E], f32)>,
}

impl<E: Element> Gradient<'_, E> {
    /// The values from `start` on.
    pub fn row(&self, out: &mut [f32], start: usize) {
        E::widen(out, &self.dout[start..start + out.len()]);
        if let Some((residual, alpha)) = self.residual {
            for (out, residual) in out.iter_mut().zip(&residual[start..]) {
                *out += alpha * residual.to_f32();
            }
        }
    }

    /// One value.
    pub fn at(&self, place: usize) -> f32 {
        let along = |(residual, alpha): (&[E], f32)| alpha * residual[place].to_f32();
        self.dout[place].to_f32() + self.residual.map_or(0.0, along)
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
    let (means, rstds) = stats[..2 * rows].split_at_mut(rows);
    let width = cols as f32;
    threads.items(means, cols, |row, mean| {
        *mean = reduce::sum(&x[row * cols..][..cols]) / width;
    });
    let means = &*means;
    threads.items(rstds, cols, |row, rstd| {
        let variance = reduce::sum_squares(&x[row * cols..][..cols], means[row]) / width;
        *rstd = 1.0 / (variance + eps).sqrt();
    });
    let rstds = &*rstds;
    threads.rows(&mut out[..rows * cols], cols, |row, out| {
        let (mean, rstd) = (means[row], rstds[row]);
        let x = &x[row * cols..][..cols];
        for (((out, &x), weight), bias) in out.iter_mut().zip(x).zip(weight).zip(bias) {
            *out = E::from_f32((x - mean) * rstd * weight.to_f32() + bias.to_f32());
        }
    });
}

/// `dx = rstd * (g - mean(g) - xhat * mean(g xhat))` with `g = dout * weight`.
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
    let width = cols as f32;
    threads.rows(&mut dx[..rows * cols], cols, |row, dx| {
        let (mean, rstd) = (stats[row], stats[rows + row]);
        let mut g = vec![0.0f32; cols];
        dout.row(&mut g, row * cols);
        for (g, weight) in g.iter_mut().zip(weight) {
            *g *= weight.to_f32();
        }
        let xhat: Vec<f32> = x[row * cols..][..cols]
            .iter()
            .map(|&x| (x - mean) * rstd)
            .collect();
        let g_mean = reduce::sum(&g) / width;
        let gx_mean = reduce::dot(&g, &xhat) / width;
        for ((dx, &g), &xhat) in dx.iter_mut().zip(&g).zip(&xhat) {
            *dx = E::from_f32(rstd * (g - g_mean - xhat * gx_mean));
        }
    });
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
    threads.pieces(&mut dweight[..cols], |start, dweight| {
        for row in 0..rows {
            let (mean, rstd) = (stats[row], stats[rows + row]);
            for (col, dweight) in (start..).zip(dweight.iter_mut()) {
                *dweight += dout.at(row * cols + col) * (x[row * cols + col] - mean) * rstd;
            }
        }
    });
    threads.pieces(&mut dbias[..cols], |start, dbias| {
        for row in 0..rows {
            for (col, dbias) in (start..).zip(dbias.iter_mut()) {
                *dbias += dout.at(row * cols + col);
            }
        }
    });
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
            for (sum, x) in sums.iter_mut().zip(&x[row * cols + start..]) {
                *sum += x.to_f32();
            }
        }
    });
}
