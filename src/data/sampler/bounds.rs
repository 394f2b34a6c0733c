//! The most that any micro-batch can hold, for those who set memory aside.

use std::collections::BTreeMap;

use super::{MicroBatchSize, Order, Sampler};
use crate::data::rows::Rows;

impl Sampler {
    /// Most tokens that any micro-batch from here on can have. With a number of rows: exact for
    /// rows as given, for shuffled or bucketed rows as if the longest met. With a budget: the
    /// budget, or the longest row if it is longer.
    pub fn max_tokens(&self, rows: &Rows) -> usize {
        match self.size {
            MicroBatchSize::Rows(size) => self.most(size, rows.lengths()),
            MicroBatchSize::Tokens(budget) => {
                let longest = rows.lengths().max().unwrap_or(0);
                longest.max(budget.min(rows.tokens()))
            }
        }
    }

    /// Most targets that any micro-batch from here on can have, in the same sense; with a budget a
    /// bound that need not be reached.
    pub fn max_targets(&self, rows: &Rows) -> usize {
        match self.size {
            MicroBatchSize::Rows(size) => self.most(size, rows.target_counts()),
            // The first token of a row is no target.
            MicroBatchSize::Tokens(_) => {
                let tokens = self.max_tokens(rows);
                rows.targets().min(tokens.saturating_sub(1))
            }
        }
    }

    /// Most sequences that any micro-batch can have; with a budget as if the shortest rows met.
    pub fn max_sequences(&self, rows: &Rows) -> usize {
        match self.size {
            MicroBatchSize::Rows(size) => size.min(rows.len()),
            MicroBatchSize::Tokens(budget) => {
                let (mut left, mut sequences) = (budget, 0);
                for (length, count) in counts(rows.lengths()) {
                    let fit = count.min(left / length.max(1));
                    sequences += fit;
                    left -= fit * length;
                    if fit < count {
                        break;
                    }
                }
                // A row that is longer than the budget stands alone.
                sequences.max(1).min(rows.len())
            }
        }
    }

    fn most(&self, size: usize, amounts: impl ExactSizeIterator<Item = usize>) -> usize {
        if self.order != Order::AsGiven || self.buckets.is_some() {
            let mut left = size;
            let largest = counts(amounts).into_iter().rev();
            let taken = largest.map_while(|(amount, count)| {
                let taken = count.min(left);
                left -= taken;
                (taken > 0).then_some(taken * amount)
            });
            return taken.sum();
        }
        // What is left of this epoch may be grouped differently, if the micro-batch size was
        // another one before a resume.
        let (mut most, mut whole, mut rest) = (0, 0, 0);
        for (row, amount) in amounts.enumerate() {
            whole = amount + if row % size == 0 { 0 } else { whole };
            most = most.max(whole);
            if let Some(row) = row.checked_sub(self.state.row) {
                rest = amount + if row % size == 0 { 0 } else { rest };
                most = most.max(rest);
            }
        }
        most
    }
}

/// How often each amount comes: a table as large as rows are long, not as rows are many.
fn counts(amounts: impl Iterator<Item = usize>) -> BTreeMap<usize, usize> {
    let mut counts = BTreeMap::new();
    for amount in amounts {
        *counts.entry(amount).or_insert(0) += 1;
    }
    counts
}
