//! The normaliser's precompiled rules: a darts-clone double array and the replacements it points to.

use super::error::SentencePieceError;

/// Real ones have about 240 KB.
const MAX_BYTES: usize = 4 << 20;

/// The most bytes of a replacement, which real ones have 33 of. Without it, a rule could cost as much as
/// the file is long, and there may be a million rules.
const MAX_REPLACEMENT: usize = 1024;

/// Replacement rules, longest match first.
#[derive(Debug)]
pub(super) struct Charsmap {
    units: Vec<u32>,
    /// NUL-terminated strings; a rule's value is an offset into them.
    replacements: String,
}

fn has_leaf(unit: u32) -> bool {
    unit >> 8 & 1 == 1
}

fn value(unit: u32) -> usize {
    (unit & 0x7fff_ffff) as usize
}

/// The byte that leads to this unit; a value has bit 31 set, so that no byte leads to it.
fn label(unit: u32) -> u32 {
    unit & 0x8000_00ff
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

impl Charsmap {
    /// Reads and checks a blob: length of the trie (u32), trie, replacements.
    pub(super) fn parse(blob: &[u8]) -> Result<Self, SentencePieceError> {
        if blob.len() > MAX_BYTES {
            return fail(format!("has {} bytes, more than {MAX_BYTES}", blob.len()));
        }
        let Some((header, rest)) = blob.split_first_chunk::<4>() else {
            return fail("ends inside its header".to_owned());
        };
        let len = u32::from_le_bytes(*header) as usize;
        if len == 0 || !len.is_multiple_of(4) || len > rest.len() {
            return fail(format!(
                "announces a trie of {len} bytes where {} are left",
                rest.len()
            ));
        }
        let (trie, replacements) = rest.split_at(len);
        let Ok(replacements) = String::from_utf8(replacements.to_vec()) else {
            return fail("holds replacements that are no UTF-8".to_owned());
        };
        let units = trie
            .as_chunks::<4>()
            .0
            .iter()
            .map(|unit| u32::from_le_bytes(*unit))
            .collect();
        let map = Self {
            units,
            replacements,
        };
        map.check()?;
        Ok(map)
    }

    /// Walks every path from the root: no cycle, no jump outside, every rule with a replacement.
    /// Subtrees may be shared (darts-clone folds equal ones), so each unit is entered once.
    fn check(&self) -> Result<(), SentencePieceError> {
        #[derive(Clone, Copy, PartialEq)]
        enum Seen {
            No,
            OnPath,
            Done,
        }
        // A unit can only be reached from the place that its label leads back to.
        let mut by_place: Vec<(usize, usize)> = (0..self.units.len())
            .filter(|&unit| label(self.units[unit]) < 256)
            .map(|unit| (unit ^ label(self.units[unit]) as usize, unit))
            .collect();
        by_place.sort_unstable();
        let first_at = |place| by_place.partition_point(|&(p, _)| p < place);
        let mut seen = vec![Seen::No; self.units.len()];
        seen[0] = Seen::OnPath;
        let root = self.enter(0)?;
        // Unit, place of its children, the next of them in `by_place`.
        let mut path = vec![(0, root, first_at(root))];
        while let Some((unit, place, next)) = path.last_mut() {
            let Some(&(_, child)) = by_place.get(*next).filter(|(p, _)| p == place) else {
                seen[*unit] = Seen::Done;
                path.pop();
                continue;
            };
            *next += 1;
            match seen[child] {
                Seen::No => {
                    seen[child] = Seen::OnPath;
                    let children = self.enter(child)?;
                    path.push((child, children, first_at(children)));
                }
                Seen::OnPath => return fail(format!("has a cycle through unit {child}")),
                Seen::Done => {}
            }
        }
        Ok(())
    }

    /// Checks one unit; returns where its children are.
    fn enter(&self, index: usize) -> Result<usize, SentencePieceError> {
        let unit = self.units[index];
        let children = index ^ offset(unit);
        let Some(&leaf) = self.units.get(children) else {
            return fail(format!(
                "points from unit {index} to {children} of {}",
                self.units.len()
            ));
        };
        if has_leaf(unit) && self.replacement(value(leaf)).is_none() {
            return fail(format!(
                "has a rule whose replacement starts at {} of {}",
                value(leaf),
                self.replacements.len()
            ));
        }
        Ok(children)
    }

    fn replacement(&self, at: usize) -> Option<&str> {
        let rest = self.replacements.get(at..)?;
        let reach = &rest.as_bytes()[..rest.len().min(MAX_REPLACEMENT)];
        rest.get(..reach.iter().position(|&byte| byte == 0)?)
    }

    /// The longest rule that `text` starts with: bytes it covers and what replaces them.
    pub(super) fn longest_rule(&self, text: &str) -> Option<(usize, &str)> {
        let mut node = offset(*self.units.first()?);
        let mut longest = None;
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            node ^= usize::from(byte);
            let Some(&unit) = self.units.get(node) else {
                break;
            };
            if label(unit) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            // Rules of a real file end with a character; one that does not cannot be applied to text.
            if has_leaf(unit) && text.is_char_boundary(at + 1) {
                longest = self.units.get(node).map(|&leaf| (at + 1, value(leaf)));
            }
        }
        let (len, at) = longest?;
        Some((len, self.replacement(at)?))
    }
}

fn fail<T>(problem: String) -> Result<T, SentencePieceError> {
    Err(SentencePieceError::Charsmap { problem })
}
