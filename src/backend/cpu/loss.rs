//! Softmax cross-entropy and its gradient.

use multiversion::multiversion;

use super::reduce;
use super::threads::{Scattered, Threads, with_scratch};
use crate::backend::{Element, Work};

pub fn cross_entropy<E: Element>(
    threads: &Threads,
    loss: &mut [f32],
    logits: &mut [E],
    ids: &[u32],
    vocab_size: usize,
    scale: f32,
) {
    let _counting = threads.clock.count(Work::Loss);
    let loss = Scattered::new(loss);
    let logits = &mut logits[..ids.len() * vocab_size];
    threads.rows(logits, vocab_size, |row, logits| {
        let value = with_scratch(vocab_size, |values| {
            cross_entropy_row(logits, values, ids[row] as usize, scale)
        });
        // SAFETY: each row writes its own place.
        unsafe { loss.at(row, 1) }.fill(value);
    });
}

/// The loss of one row; its logits become their gradient.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn cross_entropy_row<E: Element>(
    logits: &mut [E],
    values: &mut [f32],
    id: usize,
    scale: f32,
) -> f32 {
    for (value, logit) in values.iter_mut().zip(&*logits) {
        *value = logit.to_f32();
    }
    let target = values[id];
    let max = reduce::max(values);
    for value in &mut *values {
        *value = reduce::exp(*value - max);
    }
    let sum = reduce::sum(values);
    let factor = scale / sum;
    for (logit, value) in logits.iter_mut().zip(&*values) {
        *logit = E::from_f32(value * factor);
    }
    logits[id] = E::from_f32(values[id] * factor - scale);
    sum.ln() + max - target
}
