//! Sums over tensors and the AdamW step.

use multiversion::multiversion;

use super::Cpu;
use super::reduce;
use super::threads::{Scattered, Threads};
use crate::backend::{AdamwStep, AdamwTensor, Element, Work};

/// Values per partial sum; partial sums are added in order.
const PIECE: usize = 8192;

fn pieces(threads: &Threads, x: &[f32], partial: impl Fn(&[f32]) -> f32 + Sync) -> f32 {
    let mut partials = vec![0.0f32; x.len().div_ceil(PIECE)];
    threads.items(&mut partials, PIECE, |index, sum| {
        let start = index * PIECE;
        *sum = partial(&x[start..x.len().min(start + PIECE)]);
    });
    reduce::sum(&partials)
}

pub fn sum(threads: &Threads, x: &[f32]) -> f32 {
    let _counting = threads.clock.count(Work::Loss);
    pieces(threads, x, sum_of_piece)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn sum_of_piece(x: &[f32]) -> f32 {
    reduce::sum(x)
}

pub fn sum_squares(threads: &Threads, x: &[f32], scale: f32) -> f32 {
    let _counting = threads.clock.count(Work::Optimizer);
    scale * scale * pieces(threads, x, sum_squares_of_piece)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn sum_squares_of_piece(x: &[f32]) -> f32 {
    reduce::sum_squares(x, 0.0)
}

/// The four arrays of a trainable tensor that an optimiser step changes, and its gradient.
pub struct Tensor<'a, E> {
    /// Copy in the storage type.
    pub working: &'a mut [E],
    /// f32 values.
    pub master: &'a mut [f32],
    /// First moment.
    pub exp_avg: &'a mut [f32],
    /// Second moment.
    pub exp_avg_sq: &'a mut [f32],
    /// Gradient.
    pub gradient: &'a [f32],
}

impl<'a, E: Element> Tensor<'a, E> {
    /// That of the CPU's buffers.
    pub fn of(tensor: &'a mut AdamwTensor<'_, Cpu<E>>) -> Self {
        let len = tensor.len;
        Tensor {
            working: &mut tensor.working[..len],
            master: &mut tensor.master[..len],
            exp_avg: &mut tensor.exp_avg[..len],
            exp_avg_sq: &mut tensor.exp_avg_sq[..len],
            gradient: &tensor.gradient[..len],
        }
    }
}

pub fn adamw<E: Element>(
    threads: &Threads,
    tensor: Tensor<'_, E>,
    weight_decay: f32,
    step: AdamwStep,
) {
    let _counting = threads.clock.count(Work::Optimizer);
    let len = tensor.master.len();
    let (working, master) = (
        Scattered::new(tensor.working),
        Scattered::new(tensor.master),
    );
    let exp_avg = Scattered::new(tensor.exp_avg);
    let exp_avg_sq = Scattered::new(tensor.exp_avg_sq);
    threads.tasks(len.div_ceil(PIECE), |task| {
        let start = task * PIECE;
        let count = PIECE.min(len - start);
        // SAFETY: each task has places of its own, in every one of the four arrays.
        let piece = unsafe {
            Tensor {
                working: working.at(start, count),
                master: master.at(start, count),
                exp_avg: exp_avg.at(start, count),
                exp_avg_sq: exp_avg_sq.at(start, count),
                gradient: &tensor.gradient[start..start + count],
            }
        };
        adamw_piece(piece, weight_decay, step);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn adamw_piece<E: Element>(tensor: Tensor<'_, E>, weight_decay: f32, step: AdamwStep) {
    let moments = tensor.exp_avg.iter_mut().zip(tensor.exp_avg_sq);
    let values = tensor.master.iter_mut().zip(tensor.working);
    for (((m, v), (master, working)), gradient) in moments.zip(values).zip(tensor.gradient) {
        let g = step.gradient_scale * gradient;
        *m = step.beta1 * *m + (1.0 - step.beta1) * g;
        *v = step.beta2 * *v + (1.0 - step.beta2) * g * g;
        let decayed = *master * (1.0 - step.learning_rate * weight_decay);
        let denominator = (*v / step.bias_correction2).sqrt() + step.eps;
        *master = decayed - step.learning_rate * (*m / step.bias_correction1) / denominator;
        *working = E::from_f32(*master);
    }
}
