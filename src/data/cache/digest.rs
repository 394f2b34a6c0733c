//! A fingerprint of bytes: their number, their CRC-32, and 64 bits of another kind.

use serde::Serialize;

/// The fingerprint of a run of bytes. It tells apart what changed by chance or by hand; it is no
/// protection against someone who wants two contents to look alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Digest {
    /// Number of bytes.
    pub bytes: u64,
    /// CRC-32.
    pub crc32: u32,
    /// A product of all words, each mixed in before the multiplication.
    pub mixed: u64,
}

impl Digest {
    /// As text for a file name.
    pub fn name(&self) -> String {
        format!("{:016x}{:08x}", self.mixed, self.crc32)
    }
}

/// Takes bytes bit by bit; how they are cut makes no difference.
#[derive(Clone, Debug)]
pub struct Digester {
    bytes: u64,
    crc32: crc32fast::Hasher,
    mixed: u64,
    /// The word that is not complete yet, its bytes from the lowest.
    word: u64,
}

/// 2^64 over the golden ratio, odd: multiplying by it loses nothing.
const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;

impl Default for Digester {
    fn default() -> Self {
        Self {
            bytes: 0,
            crc32: crc32fast::Hasher::new(),
            mixed: FACTOR,
            word: 0,
        }
    }
}

impl Digester {
    /// Takes more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.crc32.update(bytes);
        let begun = (self.bytes % 8) as usize;
        self.bytes += bytes.len() as u64;
        let (first, rest) = match begun {
            0 => (&[][..], bytes),
            _ => bytes.split_at(bytes.len().min(8 - begun)),
        };
        for (place, &byte) in first.iter().enumerate() {
            self.word |= u64::from(byte) << (8 * (begun + place));
        }
        if begun > 0 && begun + first.len() == 8 {
            self.mix();
        }
        let (words, last) = rest.as_chunks::<8>();
        for word in words {
            self.word = u64::from_le_bytes(*word);
            self.mix();
        }
        for (place, &byte) in last.iter().enumerate() {
            self.word |= u64::from(byte) << (8 * place);
        }
    }

    fn mix(&mut self) {
        let mixed = (self.mixed ^ std::mem::take(&mut self.word)).wrapping_mul(FACTOR);
        self.mixed = mixed ^ (mixed >> 32);
    }

    /// The fingerprint of all bytes taken.
    pub fn finish(mut self) -> Digest {
        self.mix();
        self.word = self.bytes;
        self.mix();
        Digest {
            bytes: self.bytes,
            crc32: self.crc32.finalize(),
            mixed: self.mixed,
        }
    }
}

/// The fingerprint of bytes in memory.
pub fn digest(bytes: &[u8]) -> Digest {
    let mut digester = Digester::default();
    digester.update(bytes);
    digester.finish()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn how_bytes_are_cut_makes_no_difference() {
        let bytes: Vec<u8> = (0..61_u8).map(|i| i.wrapping_mul(37)).collect();
        let whole = digest(&bytes);
        for first in 0..bytes.len() {
            for second in first..bytes.len() {
                let mut digester = Digester::default();
                digester.update(&bytes[..first]);
                digester.update(&bytes[first..second]);
                digester.update(&bytes[second..]);
                assert_eq!(digester.finish(), whole, "{first} {second}");
            }
        }
    }

    #[test]
    fn every_byte_and_every_place_counts() {
        let mut seen = HashSet::new();
        for len in 0..40 {
            let zeros = vec![0_u8; len];
            assert!(seen.insert(digest(&zeros).mixed));
            for place in 0..len {
                let mut one = zeros.clone();
                one[place] = 1;
                assert!(seen.insert(digest(&one).mixed), "{len} {place}");
            }
        }
    }
}
