//! The choice of the next token from its logits, as Hugging Face's generation defines it: repetition
//! penalty, temperature, top-k, top-p, in this order; then one random draw.

use crate::config::generate::Sampling;
use crate::random::{Domain, Key};

/// Why no token can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error(
    "{count} of the {of} logits are not finite (the first is {value}, of id {id}): weights or \
     adapter are damaged or of a run that diverged, or too large for f16 (then --precision f32 helps)"
)]
pub struct SampleError {
    /// First id with such a logit.
    pub id: usize,
    /// Its logit.
    pub value: f32,
    /// How many there are.
    pub count: usize,
    /// Number of logits.
    pub of: usize,
}

/// Which random number is drawn: that of this token of this prompt, whatever else was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Number of the prompt, from 0.
    pub prompt: u64,
    /// Number of the new token, from 0.
    pub token: u32,
}

/// Chooses the id of the next token by its `logits [V]`; `seen` are the ids before it, those of the
/// prompt included. At temperature 0 it is the likeliest, the lowest id of equals.
///
/// # Errors
/// A logit that is not finite.
pub fn choose(
    logits: &[f32],
    seen: &[u32],
    sampling: &Sampling,
    draw: Draw,
) -> Result<u32, SampleError> {
    if sampling.temperature == 0.0 {
        return Ok(likeliest(&penalised(logits, seen, sampling)?));
    }
    let shares = distribution(logits, seen, sampling)?;
    let mut left =
        uniform(sampling.seed, draw) * shares.iter().map(|(_, share)| share).sum::<f64>();
    for &(id, share) in &shares {
        if left < share {
            return Ok(id);
        }
        left -= share;
    }
    // Rounding can leave a little behind the last one.
    Ok(shares.last().map_or(0, |&(id, _)| id))
}

/// The ids that can be drawn, ascending, each with its probability; the temperature is above 0.
///
/// Of equal logits at the edge of top-k all stay, as with Hugging Face. Of equal ones at the edge of
/// top-p the lower ids stay (there it is left to the sort), so that a top_p near 0 is greedy.
///
/// # Errors
/// A logit that is not finite.
pub fn distribution(
    logits: &[f32],
    seen: &[u32],
    sampling: &Sampling,
) -> Result<Vec<(u32, f64)>, SampleError> {
    let scores = penalised(logits, seen, sampling)?;
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let floor = kth_largest(&scores, sampling.top_k);
    // Relative to the largest, nothing overflows however small the temperature is.
    let weight =
        |score: f32| ((f64::from(score) - f64::from(largest)) / sampling.temperature).exp();
    let mut shares: Vec<(u32, f64)> = (0..)
        .zip(&scores)
        .filter(|&(_, &score)| score >= floor)
        .map(|(id, &score)| (id, weight(score)))
        .collect();
    normalise(&mut shares);
    if sampling.top_p < 1.0 {
        keep_top_p(&mut shares, &scores, sampling.top_p);
        normalise(&mut shares);
    }
    Ok(shares)
}

/// Logits after the repetition penalty.
fn penalised(logits: &[f32], seen: &[u32], sampling: &Sampling) -> Result<Vec<f32>, SampleError> {
    let mut bad = (0..).zip(logits).filter(|(_, logit)| !logit.is_finite());
    if let Some((id, &value)) = bad.next() {
        return Err(SampleError {
            id,
            value,
            count: 1 + bad.count(),
            of: logits.len(),
        });
    }
    let mut scores = logits.to_vec();
    let penalty = sampling.repetition_penalty as f32;
    if penalty != 1.0 {
        for &id in seen {
            // From the logits, not from the scores: an id that was seen twice is punished once.
            if let Some(&logit) = logits.get(id as usize) {
                let score = if logit < 0.0 {
                    logit * penalty
                } else {
                    logit / penalty
                };
                scores[id as usize] = score.clamp(f32::MIN, f32::MAX);
            }
        }
    }
    Ok(scores)
}

/// The lowest id of the largest score.
fn likeliest(scores: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, &score) in (0..).zip(scores) {
        if score > best.1 {
            best = (id, score);
        }
    }
    best.0
}

/// The k-th largest score; below all of them if there are no more than k, or k is 0.
fn kth_largest(scores: &[f32], k: usize) -> f32 {
    if k == 0 || k >= scores.len() {
        return f32::NEG_INFINITY;
    }
    let mut ordered = scores.to_vec();
    let (_, kth, _) = ordered.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a));
    *kth
}

/// Keeps the likeliest tokens, as long as those before them have not reached `top_p`; at least one.
fn keep_top_p(shares: &mut Vec<(u32, f64)>, scores: &[f32], top_p: f64) {
    let score = |id: u32| scores.get(id as usize).copied().unwrap_or_default();
    shares.sort_by(|&(a, _), &(b, _)| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    let mut before = 0.0;
    let kept = shares.iter().position(|&(_, share)| {
        let reached = before >= top_p && before > 0.0;
        before += share;
        reached
    });
    shares.truncate(kept.unwrap_or(shares.len()));
    shares.sort_unstable_by_key(|&(id, _)| id);
}

fn normalise(shares: &mut [(u32, f64)]) {
    let total: f64 = shares.iter().map(|(_, share)| share).sum();
    for (_, share) in shares {
        *share /= total;
    }
}

/// A number in `[0, 1)` with 53 random bits.
fn uniform(seed: u64, draw: Draw) -> f64 {
    let key = Key::new(seed, Domain::Sampling).fold(draw.prompt);
    let [low, high, _, _] = key.words(draw.token, 0);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 11;
    bits as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
