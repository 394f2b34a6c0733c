//! The rows that are trained on: made up, of lengths that are the same in every step.

use serde::Serialize;

use super::SEED;
use crate::config::model::ModelConfig;
use crate::data::batch::{MicroBatch, Sequence, Target};
use crate::random::{Domain, Key};

/// Tokens of the shortest row: some context, and a token that is a target.
pub const SHORTEST: usize = 4;

/// The mix's median is this part of its longest row.
const MEDIAN_SHARE: f64 = 1.0 / 8.0;

/// Standard deviation of the logarithms of the mix's lengths.
const LOG_SPREAD: f64 = 0.8;

/// Tokens of the rows of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Lengths {
    /// These, one row after another, and again from the first.
    Listed {
        /// Tokens of each row.
        tokens: Vec<usize>,
    },
    /// Many short rows and a few long ones, as in data of questions and answers: the logarithms of
    /// the lengths are normal, the median an eighth of the longest row, their standard deviation
    /// 0.8 (one row in six is longer than 2.2 medians, one in twenty than 3.7); what is longer than
    /// the longest row is cut there. Drawn once from a fixed seed: row i is the same in every run.
    Mixed {
        /// Tokens of the longest row.
        longest: usize,
    },
}

impl Lengths {
    /// Tokens of the first `rows` rows.
    pub fn of_rows(&self, rows: usize) -> Vec<usize> {
        match self {
            Lengths::Listed { tokens } => tokens.iter().copied().cycle().take(rows).collect(),
            Lengths::Mixed { longest } => {
                // Steps fold their number here, and none has this one.
                let key = Key::new(SEED, Domain::Sampling).fold(u64::MAX);
                let median = (*longest as f64 * MEDIAN_SHARE).ln();
                let length = |row| {
                    let z = f64::from(key.fold(row as u64).stream().normal());
                    let tokens = (median + LOG_SPREAD * z).exp().round() as usize;
                    tokens.clamp(SHORTEST, (*longest).max(SHORTEST))
                };
                (0..rows).map(length).collect()
            }
        }
    }

    /// Tokens of the shortest and of the longest row that there may be.
    pub fn range(&self) -> (usize, usize) {
        match self {
            Lengths::Listed { tokens } => (
                tokens.iter().copied().min().unwrap_or(0),
                tokens.iter().copied().max().unwrap_or(0),
            ),
            Lengths::Mixed { longest } => (SHORTEST.min(*longest), *longest),
        }
    }
}

/// The micro-batches of step `step`: `per_batch` rows each, of `lengths` tokens. Ids are random; the
/// first half of a row is the context, and each token of the second half is a target of the one
/// before it, as in a row of prompt and answer.
pub fn micro_batches(
    lengths: &[usize],
    per_batch: usize,
    config: &ModelConfig,
    step: u64,
) -> Vec<MicroBatch> {
    let rows = lengths.chunks(per_batch.max(1));
    let micro_batch = |(index, lengths): (usize, &[usize])| {
        let key = Key::new(SEED, Domain::Sampling);
        let mut random = key.fold(step).fold(index as u64).stream();
        let mut batch = MicroBatch::default();
        for &len in lengths {
            let (start, half) = (batch.tokens(), len / 2);
            let context_length = context_length(config, len);
            for t in 0..len {
                let id = random.below(config.vocab_size as u64 - 8) as u32;
                batch.input_ids.push(id);
                let (position, inside) = match context_length {
                    0 => (t, 0),
                    context => (t.min(context), (t + 1).saturating_sub(context)),
                };
                batch.position.push(position as u32);
                batch.block_position.push(inside as u32);
            }
            batch.sequences.push(Sequence {
                start,
                len,
                context_length,
            });
            batch.targets.extend((half..len - 1).map(|t| Target {
                row: (start + t) as u32,
                id: batch.input_ids[start + t + 1],
            }));
        }
        batch
    };
    rows.enumerate().map(micro_batch).collect()
}

/// Tokens that are visible both ways: the first half in ChatGLM-6B, none in later generations.
fn context_length(config: &ModelConfig, len: usize) -> usize {
    config.context_ids.map_or(0, |_| len / 2)
}

/// What the rows of a step amount to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RowCounts {
    /// Rows.
    pub samples: u64,
    /// Tokens, all of them real.
    pub tokens: u64,
    /// Tokens with a target.
    pub targets: u64,
    /// Pairs of a token and a token that it sees, itself included.
    pub visible_pairs: u64,
    /// Tokens that the micro-batches would have if each were padded to its longest row.
    pub padded_tokens: u64,
}

impl RowCounts {
    /// Of these micro-batches.
    pub fn of(batches: &[MicroBatch]) -> Self {
        let mut counts = RowCounts::default();
        for batch in batches {
            counts.samples += batch.sequences.len() as u64;
            counts.tokens += batch.tokens() as u64;
            counts.targets += batch.targets.len() as u64;
            counts.padded_tokens += (batch.max_len() * batch.sequences.len()) as u64;
            let pairs = batch.sequences.iter().map(visible_pairs);
            counts.visible_pairs += pairs.sum::<u64>();
        }
        counts
    }
}

/// Each token sees the whole context, and all before it.
fn visible_pairs(sequence: &Sequence) -> u64 {
    let len = sequence.len as u64;
    let context = sequence.context_length.min(sequence.len) as u64;
    let triangle = |n: u64| n * (n + 1) / 2;
    context * context + triangle(len) - triangle(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::model_size::ModelSize;

    #[test]
    fn a_mix_has_many_short_rows_and_few_long_ones() {
        let mix = Lengths::Mixed { longest: 1_024 };
        let mut rows = mix.of_rows(2_000);
        // A step of more micro-batches has the same rows, and more.
        assert_eq!(rows[..65], mix.of_rows(65));
        assert_ne!(rows[..65], rows[65..130]);
        rows.sort_unstable();
        assert!(rows[0] >= SHORTEST && rows[1_999] == 1_024);
        let median = rows[1_000];
        assert!((118..=138).contains(&median), "{median}");
        let beyond = |tokens| rows.iter().filter(|&&row| row > tokens).count();
        assert!((250..=400).contains(&beyond(285)), "{}", beyond(285));
        assert!((60..=150).contains(&beyond(477)), "{}", beyond(477));
        let short = Lengths::Mixed { longest: 5 }.of_rows(97);
        assert!(short.iter().all(|row| (4..=5).contains(row)));
    }

    #[test]
    fn a_list_is_repeated() {
        let tokens = vec![65, 4, 97];
        let list = Lengths::Listed { tokens };
        assert_eq!(list.of_rows(5), [65, 4, 97, 65, 4]);
        assert_eq!(list.range(), (4, 97));
    }

    #[test]
    fn pairs_are_counted_as_they_are_seen() {
        for size in [ModelSize::Tiny, ModelSize::ChatGlm2_6b] {
            let config = size.config();
            let batches = micro_batches(&[4, 65, 97, 5, 1], 2, &config, 3);
            assert_eq!(batches.len(), 3);
            let mut seen = RowCounts::default();
            for batch in &batches {
                for sequence in &batch.sequences {
                    seen.samples += 1;
                    for query in 0..sequence.len {
                        seen.tokens += 1;
                        let is_visible =
                            |&key: &usize| key <= query || key < sequence.context_length;
                        seen.visible_pairs += (0..sequence.len).filter(is_visible).count() as u64;
                    }
                }
                seen.targets += batch.targets.len() as u64;
            }
            seen.padded_tokens = 2 * 65 + 2 * 97 + 1;
            assert_eq!(RowCounts::of(&batches), seen);
            assert_eq!(seen.targets, 1 + 32 + 48 + 2);
        }
    }
}
