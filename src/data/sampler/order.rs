//! The order of the rows of one epoch.

use super::permutation::Permutation;
use crate::data::rows::Rows;
use crate::random::{self, Domain, Key};

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

/// Up to so many rows are shuffled in a table, in which every order is equally likely; more by a
/// cipher, which takes no memory.
const TABLE_ROWS: usize = 1 << 22;

/// Neighbours by length that stay together when a window is shuffled.
const NEIGHBOURS: usize = 64;

#[derive(Clone, Debug)]
enum Base {
    AsGiven,
    Table(Vec<usize>),
    Cipher(Permutation),
}

/// Rows are brought together by length within windows of the order.
#[derive(Clone, Debug)]
pub(super) struct Buckets {
    /// Rows of a window.
    pub window: usize,
    /// Whose lengths count.
    pub rows: Rows,
}

/// The order of one epoch.
#[derive(Clone, Debug)]
pub(in crate::data) struct EpochOrder {
    rows: usize,
    base: Base,
    /// Key of the order of neighbours inside windows.
    key: Option<Key>,
    buckets: Option<Buckets>,
    /// The window that was looked at last, with its number.
    window: Option<(usize, Vec<usize>)>,
}

impl EpochOrder {
    /// The order of epoch `epoch` of `rows` rows.
    pub(in crate::data) fn new(order: Order, epoch: u64, rows: usize) -> Self {
        let key = |seed| Key::new(seed, Domain::Shuffle).fold(epoch);
        let (base, key) = match order {
            Order::AsGiven => (Base::AsGiven, None),
            Order::Shuffled { seed } if rows <= TABLE_ROWS => {
                let table = random::shuffle(seed, epoch, rows);
                (Base::Table(table), Some(key(seed)))
            }
            Order::Shuffled { seed } => {
                let cipher = Permutation::new(key(seed), rows);
                (Base::Cipher(cipher), Some(key(seed)))
            }
        };
        Self {
            rows,
            base,
            key,
            buckets: None,
            window: None,
        }
    }

    /// The same order, but for windows sorted by length.
    pub(super) fn bucketed(mut self, buckets: Option<Buckets>) -> Self {
        self.buckets = buckets;
        self
    }

    /// The row at a place of the epoch.
    pub(in crate::data) fn at(&mut self, place: usize) -> usize {
        let Some(size) = self.buckets.as_ref().map(|buckets| buckets.window) else {
            return self.base(place);
        };
        let number = place / size;
        if self.window.as_ref().is_none_or(|(held, _)| *held != number) {
            self.window = Some((number, self.sorted_window(number, size)));
        }
        let window = self.window.as_ref().map(|(_, rows)| rows.as_slice());
        let row = window.unwrap_or_default().get(place % size);
        row.copied().unwrap_or(place)
    }

    fn base(&self, place: usize) -> usize {
        match &self.base {
            Base::AsGiven => place,
            Base::Table(table) => table.get(place).copied().unwrap_or(place),
            Base::Cipher(cipher) => cipher.at(place),
        }
    }

    /// The rows of a window, rows of similar length together. What is shuffled is shuffled here
    /// too, in runs of neighbours: else every window would go from short rows to long ones.
    fn sorted_window(&self, number: usize, size: usize) -> Vec<usize> {
        let start = number * size;
        let end = start.saturating_add(size).min(self.rows);
        let mut rows: Vec<usize> = (start..end).map(|place| self.base(place)).collect();
        if let Some(buckets) = &self.buckets {
            rows.sort_by_cached_key(|&row| buckets.rows.length(row));
        }
        let Some(key) = self.key else {
            return rows;
        };
        let mut runs: Vec<&[usize]> = rows.chunks(NEIGHBOURS).collect();
        let mut stream = key.fold(number as u64).stream();
        for last in (1..runs.len()).rev() {
            runs.swap(last, stream.below(last as u64 + 1) as usize);
        }
        runs.concat()
    }
}
