//! The micro-batch as the engine sees it: real tokens only, flat, with sequence offsets.

use super::positions::next_positions;
use super::rows::{PromptRow, Row, Rows};

/// One sequence inside a [`MicroBatch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Row of its first token in the flat list.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Keys `0..context_length` of the sequence are visible to all its queries; later keys are causal.
    pub context_length: usize,
}

/// A row that has something to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row in the flat list whose logits are compared.
    pub row: u32,
    /// The id to be predicted there: the label of the *next* token.
    pub id: u32,
}

/// Several sequences, unpadded, one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids, `[T]`.
    pub input_ids: Vec<u32>,
    /// Position in the context, `[T]` (first row of the original `position_ids`).
    pub position: Vec<u32>,
    /// Position inside the block that is being written, `[T]` (second row of `position_ids`).
    pub block_position: Vec<u32>,
    /// The sequences, in order, covering all `T` rows.
    pub sequences: Vec<Sequence>,
    /// The rows with a target, ascending.
    pub targets: Vec<Target>,
}

impl MicroBatch {
    /// Training rows one after another, with their targets.
    pub fn from_rows<'a>(rows: impl IntoIterator<Item = Row<'a>>) -> Self {
        let mut batch = Self::default();
        for row in rows {
            let start = batch.tokens();
            let positions = (0..row.input_ids.len()).map(|t| row.positions.at(t));
            batch.push(row.input_ids, positions, row.context_length);
            batch.targets.extend(row.targets().map(|(t, id)| Target {
                row: (start + t) as u32,
                id,
            }));
        }
        batch
    }

    /// All rows in their order, each micro-batch with as many as fit into `max_tokens` tokens and
    /// `max_sequences` sequences, and with one at least.
    pub fn packed(
        rows: &Rows,
        max_tokens: usize,
        max_sequences: usize,
    ) -> impl Iterator<Item = MicroBatch> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = next;
            let mut tokens = 0;
            while next < rows.len() && (next == start || next - start < max_sequences) {
                tokens += rows.length(next);
                if tokens > max_tokens && next > start {
                    break;
                }
                next += 1;
            }
            let picked = (start..next).filter_map(|index| rows.get(index));
            (next > start).then(|| MicroBatch::from_rows(picked))
        })
    }

    /// Prompts one after another; nothing is a target.
    pub fn from_prompts<'a>(prompts: impl IntoIterator<Item = &'a PromptRow>) -> Self {
        let mut batch = Self::default();
        for prompt in prompts {
            let positions = prompt.positions.iter().copied();
            batch.push(&prompt.input_ids, positions, prompt.context_length);
        }
        batch
    }

    /// The micro-batch that continues every sequence by one token, for a model that still holds the
    /// keys and values of all tokens before: `ids` are the new tokens, one per sequence, in order.
    ///
    /// `len` and `start` count the new tokens only; `context_length` stays that of the sequence as
    /// a whole.
    pub fn continued(&self, ids: &[u32]) -> Self {
        let mut batch = Self::default();
        for (sequence, &id) in self.sequences.iter().zip(ids) {
            let end = sequence.start + sequence.len;
            let before = end.checked_sub(1).filter(|_| sequence.len > 0);
            let next = before.map_or((0, 0), |last| {
                next_positions((self.position[last], self.block_position[last]))
            });
            batch.push(&[id], std::iter::once(next), sequence.context_length);
        }
        batch
    }

    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Tokens of the longest sequence.
    pub fn max_len(&self) -> usize {
        let lengths = self.sequences.iter().map(|sequence| sequence.len);
        lengths.max().unwrap_or(0)
    }

    fn push(
        &mut self,
        ids: &[u32],
        positions: impl Iterator<Item = (u32, u32)>,
        context_length: usize,
    ) {
        self.sequences.push(Sequence {
            start: self.tokens(),
            len: ids.len(),
            context_length,
        });
        self.input_ids.extend(ids);
        for (position, block_position) in positions {
            self.position.push(position);
            self.block_position.push(block_position);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::model::ModelConfig;
    use crate::data::rows::RawRow;

    #[test]
    fn rows_are_packed_in_order_to_both_limits() {
        let config = include_str!("../../tests/golden/chatglm-6b/model/config.json");
        let model = ModelConfig::from_json(config).unwrap();
        let mut rows = Rows::default();
        // gMASK 191, sop 194.
        for text in [1_usize, 3, 1, 1, 6, 1] {
            let input_ids = [vec![191, 194], vec![7; text]].concat();
            let labels = [vec![-100; 2], vec![7; text]].concat();
            let row = RawRow {
                input_ids,
                labels,
                ..RawRow::default()
            };
            rows.push(&row, &model).unwrap();
        }
        let packed = |max_tokens, max_sequences| {
            let batches = MicroBatch::packed(&rows, max_tokens, max_sequences);
            let lengths = |batch: MicroBatch| {
                let lengths = batch.sequences.iter().map(|sequence| sequence.len);
                lengths.collect::<Vec<_>>()
            };
            batches.map(lengths).collect::<Vec<_>>()
        };
        assert_eq!(packed(100, 100), [vec![3, 5, 3, 3, 8, 3]]);
        assert_eq!(packed(8, 100), [vec![3, 5], vec![3, 3], vec![8], vec![3]]);
        assert_eq!(packed(100, 4), [vec![3, 5, 3, 3], vec![8, 3]]);
        // A row that is too long alone goes alone.
        assert_eq!(packed(5, 2)[3..], [vec![3], vec![8], vec![3]]);
        let alone = packed(0, 0);
        assert_eq!(alone, [[3], [5], [3], [3], [8], [3]]);
        assert_eq!(MicroBatch::packed(&Rows::default(), 8, 8).count(), 0);
    }
}
