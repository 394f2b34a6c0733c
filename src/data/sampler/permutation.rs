//! A random order of very many rows that needs no table.

use crate::random::Key;

/// A permutation of `0..n` by a key: a Feistel network over the next even number of bits, its round
/// function Philox, walked until it lands below `n` again (Black and Rogaway 2002, "Ciphers with
/// arbitrary finite domains").
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    key: Key,
    n: u64,
    half_bits: u32,
}

/// Four rounds are a pseudorandom permutation for large domains (Luby and Rackoff 1988); more make
/// up for halves of few bits.
const ROUNDS: u32 = 8;

impl Permutation {
    /// The permutation of `0..n` that belongs to the key.
    pub fn new(key: Key, n: usize) -> Self {
        let n = n as u64;
        let bits = u64::BITS - n.saturating_sub(1).leading_zeros();
        Self {
            key,
            n,
            half_bits: bits.div_ceil(2).max(1),
        }
    }

    /// Where `index` goes; `index` itself unless it is below `n`.
    pub fn at(&self, index: usize) -> usize {
        let mut place = index as u64;
        if place >= self.n {
            return index;
        }
        // The walk follows a cycle that began below n, so it ends there. More than a quarter of the
        // domain is below n: fewer than four turns on average.
        loop {
            place = self.encipher(place);
            if place < self.n {
                return place as usize;
            }
        }
    }

    fn encipher(&self, place: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (place >> self.half_bits, place & mask);
        for round in 0..ROUNDS {
            let word = u64::from(self.key.words(round, right)[0]);
            (left, right) = (right, left ^ (word & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::random::Domain;

    fn permutation(seed: u64, n: usize) -> Vec<usize> {
        let permutation = Permutation::new(Key::new(seed, Domain::Shuffle), n);
        (0..n).map(|index| permutation.at(index)).collect()
    }

    #[test]
    fn every_index_comes_once_for_every_size() {
        for n in (0..70).chain([255, 256, 257, 1000, 4097]) {
            let mut seen = permutation(n as u64, n);
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<_>>(), "n = {n}");
        }
        let one = Permutation::new(Key::new(1, Domain::Shuffle), 1);
        assert_eq!((one.at(0), one.at(5)), (0, 5));
    }

    #[test]
    fn keys_give_different_orders_without_a_pattern() {
        assert_ne!(permutation(1, 100), permutation(2, 100));
        let orders: HashSet<Vec<usize>> = (0..200).map(|seed| permutation(seed, 4)).collect();
        assert_eq!(orders.len(), 24, "every order of four comes up");
        // Where an index goes says nothing of where its neighbour goes: the mean distance of two
        // random places of 0..n is n / 3.
        let n = 20_000;
        let order = permutation(3, n);
        let distance = |pair: &[usize]| pair[0].abs_diff(pair[1]) as f64;
        let mean = order.windows(2).map(distance).sum::<f64>() / (n - 1) as f64;
        assert!((mean / n as f64 - 1.0 / 3.0).abs() < 0.01, "{mean}");
        let fixed = order.iter().enumerate().filter(|(at, to)| at == *to);
        assert!(fixed.count() < 10);
    }

    #[test]
    fn hundreds_of_millions_of_rows_need_no_table() {
        let permutation = Permutation::new(Key::new(5, Domain::Shuffle), 400_000_000);
        let places: HashSet<usize> = (0..2000).map(|index| permutation.at(index)).collect();
        assert_eq!(places.len(), 2000);
        assert!(places.iter().all(|&place| place < 400_000_000));
        assert!(places.iter().any(|&place| place > 390_000_000));
    }
}
