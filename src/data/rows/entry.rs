//! How a row lies in memory and in a cache file alike: a run of words, and an index entry about it.

use std::ops::Range;

/// An index entry as words, the form in which it is held.
pub(in crate::data) type EntryWords = [u32; 8];

/// Stands in place of `sop` where positions are given.
const GIVEN: u32 = u32::MAX;

/// What is known of a row, and where its words are: input ids, labels and, where positions do not
/// follow from the rule, those in the context and those in the block, `tokens` each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::data) struct RowEntry {
    /// Place of the first word.
    pub start: u64,
    /// Number of tokens.
    pub tokens: u32,
    /// Number of targets.
    pub targets: u32,
    /// Keys `0..context_length` are visible to all queries.
    pub context_length: u32,
    /// Index of the mask token and of sop, where positions follow from them.
    pub rule: Option<(u32, u32)>,
    /// Checksum of the row, wherever it lies.
    pub crc32: u32,
}

impl RowEntry {
    /// Number of words of the row.
    pub fn words(&self) -> usize {
        let lists = if self.rule.is_some() { 2 } else { 4 };
        lists * self.tokens as usize
    }

    /// Where the words are.
    pub fn range(&self) -> Range<usize> {
        let start = self.start as usize;
        start..start.saturating_add(self.words())
    }

    /// The checksum that an entry with these words has.
    pub fn crc32_of(&self, words: &[u32]) -> u32 {
        let (mask, sop) = self.rule.unwrap_or((0, GIVEN));
        let facts = [self.tokens, self.targets, self.context_length, mask, sop];
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(bytemuck::cast_slice(&facts));
        hasher.update(bytemuck::cast_slice(words));
        hasher.finalize()
    }

    /// The form in which the entry is held.
    pub fn to_words(self) -> EntryWords {
        let (mask, sop) = self.rule.unwrap_or((0, GIVEN));
        [
            self.start as u32,
            (self.start >> 32) as u32,
            self.tokens,
            self.targets,
            self.context_length,
            mask,
            sop,
            self.crc32,
        ]
    }

    /// The entry that is held in this form.
    pub fn from_words(words: EntryWords) -> Self {
        let [low, high, tokens, targets, context_length, mask, sop, crc32] = words;
        Self {
            start: u64::from(low) | u64::from(high) << 32,
            tokens,
            targets,
            context_length,
            rule: (sop != GIVEN).then_some((mask, sop)),
            crc32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_being_held() {
        let entry = RowEntry {
            start: 0x1234_5678_9abc,
            tokens: 7,
            targets: 3,
            context_length: 4,
            rule: Some((2, 3)),
            crc32: 99,
        };
        let given = RowEntry {
            rule: None,
            ..entry
        };
        for (entry, words) in [(entry, 14), (given, 28)] {
            assert_eq!(RowEntry::from_words(entry.to_words()), entry);
            assert_eq!(entry.range().len(), words);
        }
        assert_ne!(entry.crc32_of(&[1, 2]), given.crc32_of(&[1, 2]));
        assert_ne!(entry.crc32_of(&[1, 2]), entry.crc32_of(&[2, 1]));
    }
}
