//! The order in which rows are seen, with a position that can be saved and taken up again.
//!
//! Two questions are kept apart: in which order an epoch sees the rows (as given, shuffled, with
//! rows of similar length brought together), and where the order is cut into micro-batches (after a
//! number of rows, or before a budget of tokens is exceeded). So the number of rows consumed is all
//! there is to a position.

use serde::{Deserialize, Serialize};

use super::DataError;
use super::rows::Rows;

mod bounds;
mod order;
mod permutation;

use order::Buckets;
pub(super) use order::EpochOrder;
pub use order::Order;

/// How far a run has come in its data. With the seed this is all that a resumed run needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplerState {
    /// Epoch, counted from 0.
    pub epoch: u64,
    /// Rows of this epoch that were consumed.
    pub row: usize,
}

/// Where the order is cut into micro-batches. None mixes epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MicroBatchSize {
    /// After so many rows, at least one.
    Rows(usize),
    /// Before the row that would bring it to more tokens than this. A row that has more by itself
    /// is a micro-batch of its own ([`Sampler::max_tokens`] counts with it).
    Tokens(usize),
}

/// How micro-batches are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Where they end.
    pub size: MicroBatchSize,
    /// Rows of each window of the order in which rows of similar length are brought together; all
    /// stay in their window, so that an epoch stays as random as the windows are small.
    pub bucket_window: Option<usize>,
}

impl Batching {
    /// A sensible window: many micro-batches, and a small part of most data sets.
    pub const BUCKET_WINDOW: usize = 4096;

    /// So many rows at a time, in the order of the epoch.
    pub fn rows(micro_batch_size: usize) -> Self {
        Self {
            size: MicroBatchSize::Rows(micro_batch_size),
            bucket_window: None,
        }
    }
}

/// Deals out row indices, micro-batch by micro-batch, epoch after epoch.
#[derive(Clone, Debug)]
pub struct Sampler {
    count: usize,
    size: MicroBatchSize,
    /// Whose lengths a budget counts; without one, nothing.
    rows: Option<Rows>,
    order: Order,
    buckets: Option<Buckets>,
    state: SamplerState,
    /// The order of the epoch `state.epoch`, once a row of it was asked for.
    epoch: Option<EpochOrder>,
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
            count: rows,
            size: MicroBatchSize::Rows(micro_batch_size.max(1)),
            rows: None,
            order,
            buckets: None,
            state,
            epoch: None,
        })
    }

    /// A sampler over these rows that makes micro-batches as told.
    ///
    /// # Errors
    /// As [`Sampler::new`].
    pub fn over(
        rows: &Rows,
        batching: Batching,
        order: Order,
        state: SamplerState,
    ) -> Result<Self, DataError> {
        let mut sampler = Self::new(rows.len(), 1, order, state)?;
        sampler.buckets = batching.bucket_window.map(|window| Buckets {
            window: window.max(1),
            rows: rows.clone(),
        });
        sampler.size = match batching.size {
            MicroBatchSize::Rows(size) => MicroBatchSize::Rows(size.max(1)),
            tokens => {
                sampler.rows = Some(rows.clone());
                tokens
            }
        };
        Ok(sampler)
    }

    /// Where the next micro-batch begins; to be saved with a checkpoint.
    pub fn state(&self) -> SamplerState {
        self.state
    }

    /// Indices of the next rows. The last micro-batch of an epoch may be smaller: none mixes epochs.
    pub fn next_micro_batch(&mut self) -> Vec<usize> {
        if self.state.row == self.count {
            self.state.epoch += 1;
            self.state.row = 0;
            self.epoch = None;
        }
        let epoch = self.epoch.take();
        let mut epoch = epoch.unwrap_or_else(|| self.order_of(self.state.epoch));
        let group = self.group(&mut epoch, self.state.row);
        self.epoch = Some(epoch);
        self.state.row += group.len();
        group
    }

    /// Number of micro-batches of an epoch. With a budget of tokens it depends on the order, and is
    /// found by going through it once.
    pub fn micro_batches_in_epoch(&self, epoch: u64) -> u64 {
        if let MicroBatchSize::Rows(size) = self.size {
            return self.count.div_ceil(size) as u64;
        }
        let mut order = self.order_of(epoch);
        let (mut row, mut groups) = (0, 0);
        while row < self.count {
            row += self.group(&mut order, row).len();
            groups += 1;
        }
        groups
    }

    /// Steps of `micro_batches_per_step` micro-batches that the first `epochs` epochs take, from the
    /// start of the run, wherever the sampler stands. The last step may reach into the next epoch.
    pub fn steps(&self, epochs: u64, micro_batches_per_step: usize) -> u64 {
        let fixed = matches!(self.size, MicroBatchSize::Rows(_)) || self.order == Order::AsGiven;
        let micro_batches = match fixed {
            true => epochs.saturating_mul(self.micro_batches_in_epoch(0)),
            false => (0..epochs)
                .map(|epoch| self.micro_batches_in_epoch(epoch))
                .sum(),
        };
        micro_batches.div_ceil(micro_batches_per_step.max(1) as u64)
    }

    fn order_of(&self, epoch: u64) -> EpochOrder {
        EpochOrder::new(self.order, epoch, self.count).bucketed(self.buckets.clone())
    }

    /// The rows of the micro-batch that begins at a place of an epoch, which is not its end.
    fn group(&self, epoch: &mut EpochOrder, start: usize) -> Vec<usize> {
        match self.size {
            MicroBatchSize::Rows(size) => {
                let end = start.saturating_add(size).min(self.count);
                (start..end).map(|place| epoch.at(place)).collect()
            }
            MicroBatchSize::Tokens(budget) => {
                let (mut group, mut tokens) = (Vec::new(), 0_usize);
                for place in start..self.count {
                    let row = epoch.at(place);
                    let length = self.rows.as_ref().map_or(0, |rows| rows.length(row));
                    tokens = tokens.saturating_add(length);
                    if tokens > budget && !group.is_empty() {
                        break;
                    }
                    group.push(row);
                }
                group
            }
        }
    }
}
