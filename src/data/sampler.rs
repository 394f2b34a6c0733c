//! The order in which rows are seen, with a position that can be saved and taken up again.

use serde::{Deserialize, Serialize};

use super::DataError;
use super::rows::Rows;
use crate::random;

/// How far a run has come in its data. With the seed this is all that a resumed run needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Epoch, counted from 0.
    pub epoch: u64,
    /// Rows of this epoch that were consumed.
    pub row: usize,
}

/// Order of the rows inside an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// As they stand in the data.
    AsGiven,
    /// Anew in every epoch, by the seed.
    Shuffled {
        /// Key of the order.
        seed: u64,
    },
}

/// Deals out row indices, micro-batch by micro-batch, epoch after epoch.
#[derive(Clone, Debug)]
pub struct Sampler {
    rows: usize,
    micro_batch_size: usize,
    order: Order,
    state: SamplerState,
    /// The order of the epoch `state.epoch`, once a row of it was asked for.
    shuffled: Option<Vec<usize>>,
}

impl Sampler {
    /// A sampler over `rows` rows that goes on at `state` (from the start: the default state), with
    /// `micro_batch_size` rows at a time, at least one.
    ///
    /// # Errors
    /// When the data does not reach to the saved position, or there is no row at all.
    pub fn new(
        rows: usize,
        micro_batch_size: usize,
        order: Order,
        state: SamplerState,
    ) -> Result<Self, DataError> {
        if rows == 0 || state.row > rows {
            return Err(DataError::Position {
                row: state.row,
                rows,
            });
        }
        Ok(Self {
            rows,
            micro_batch_size: micro_batch_size.max(1),
            order,
            state,
            shuffled: None,
        })
    }

    /// Where the next micro-batch begins; to be saved with a checkpoint.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Indices of the next rows. The last micro-batch of an epoch may be smaller: none mixes epochs.
    pub fn next_micro_batch(&mut self) -> Vec<usize> {
        if self.state.row == self.rows {
            self.state.epoch += 1;
            self.state.row = 0;
            self.shuffled = None;
        }
        let start = self.state.row;
        let end = start.saturating_add(self.micro_batch_size).min(self.rows);
        self.state.row = end;
        match self.order {
            Order::AsGiven => (start..end).collect(),
            Order::Shuffled { seed } => {
                let order = self
                    .shuffled
                    .get_or_insert_with(|| random::shuffle(seed, self.state.epoch, self.rows));
                order[start..end].to_vec()
            }
        }
    }

    /// Most tokens that any micro-batch from here on can have: exact for rows as given, for
    /// shuffled rows as if the longest met.
    pub fn max_tokens(&self, rows: &Rows) -> usize {
        self.most(rows.lengths().collect())
    }

    /// Most targets that any micro-batch from here on can have, in the same sense.
    pub fn max_targets(&self, rows: &Rows) -> usize {
        self.most(rows.target_counts().collect())
    }

    fn most(&self, mut amounts: Vec<usize>) -> usize {
        let size = self.micro_batch_size;
        let most_of = |amounts: &[usize]| {
            let groups = amounts.chunks(size).map(|group| group.iter().sum());
            groups.max().unwrap_or(0)
        };
        match self.order {
            // What is left of this epoch may be grouped differently, if the micro-batch size was
            // another one before a resume.
            Order::AsGiven => {
                most_of(&amounts).max(most_of(amounts.get(self.state.row..).unwrap_or_default()))
            }
            Order::Shuffled { .. } => {
                amounts.sort_unstable_by_key(|&amount| std::cmp::Reverse(amount));
                amounts.iter().take(size).sum()
            }
        }
    }
}
