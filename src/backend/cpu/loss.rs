//! Softmax cross-entropy and its gradient.

use super::reduce;
use super::threads::{Scattered, Threads};
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
    let rows = ids.len();
    threads.rows(
        &mut logits[..rows * vocab_size],
        vocab_size,
        |row, logits| {
            let id = ids[row] as usize;
            let mut values = vec![0.0f32; vocab_size];
            E::widen(&mut values, logits);
            let target = values[id];
            let max = reduce::max(&values);
            for value in &mut values {
                *value = reduce::exp(*value - max);
            }
            let sum = reduce::sum(&values);
            // SAFETY: each row writes its own place.
            unsafe { loss.at(row, 1) }.fill(sum.ln() + max - target);
            let factor = scale / sum;
            for (index, (logit, value)) in logits.iter_mut().zip(&values).enumerate() {
                let one_hot = if index == id { scale } else { 0.0 };
                *logit = E::from_f32(value * factor - one_hot);
            }
        },
    );
}
