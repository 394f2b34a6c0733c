//! A double-array trie from bytes to ids (Aoe 1989), the children of a node found by XOR.

/// Marks a slot without a node.
const FREE: u32 = u32::MAX;
/// The parent of the root, which no node is.
const NOBODY: u32 = u32::MAX - 1;
/// A node where no key ends.
const NO_VALUE: u32 = u32::MAX;
/// All children of a node lie in one block, since XOR with a byte leaves the higher bits.
const BLOCK: usize = 256;
/// Places tried for a node with several children before a new block is begun. Without this bound
/// a vocabulary of 130,000 pieces takes a minute to load instead of a fraction of a second.
const MAX_TRIES: usize = 64;

#[derive(Clone, Copy, Debug)]
struct Unit {
    /// The child by byte b is in slot `base ^ b`.
    base: u32,
    /// The slot of the parent.
    parent: u32,
    /// The id of the key that ends here.
    value: u32,
}

/// Byte strings with ids.
#[derive(Debug)]
pub(super) struct Trie {
    units: Vec<Unit>,
}

impl Trie {
    /// Builds the trie from keys in ascending order without duplicates.
    pub(super) fn from_sorted(keys: &[(&[u8], u32)]) -> Self {
        let mut builder = Builder::new();
        // (slot, first key, past-the-last key, bytes already consumed)
        let mut open = vec![(0_usize, 0_usize, keys.len(), 0_usize)];
        let mut children: Vec<(u8, usize)> = Vec::with_capacity(BLOCK);
        while let Some((node, mut first, last, depth)) = open.pop() {
            if first < last && keys[first].0.len() == depth {
                builder.units[node].value = keys[first].1;
                first += 1;
            }
            children.clear();
            for (index, key) in keys[first..last].iter().enumerate() {
                let label = key.0[depth];
                if children.last().is_none_or(|&(seen, _)| seen != label) {
                    children.push((label, first + index));
                }
            }
            if children.is_empty() {
                continue;
            }
            let base = builder.place(&children);
            builder.units[node].base = base as u32;
            for (index, &(label, from)) in children.iter().enumerate() {
                let slot = base ^ usize::from(label);
                let to = children.get(index + 1).map_or(last, |next| next.1);
                builder.occupy(slot, node as u32);
                open.push((slot, from, to, depth + 1));
            }
        }
        Self {
            units: builder.units,
        }
    }

    fn child(&self, node: usize, byte: u8) -> Option<usize> {
        let slot = self.units[node].base as usize ^ usize::from(byte);
        (self.units.get(slot)?.parent as usize == node).then_some(slot)
    }

    /// The keys that `text` starts with, shortest first: their length and id.
    pub(super) fn prefixes<'a>(
        &'a self,
        text: &'a [u8],
    ) -> impl Iterator<Item = (usize, u32)> + 'a {
        let mut node = 0;
        let mut at = 0;
        std::iter::from_fn(move || {
            while let Some(&byte) = text.get(at) {
                node = self.child(node, byte)?;
                at += 1;
                let value = self.units[node].value;
                if value != NO_VALUE {
                    return Some((at, value));
                }
            }
            None
        })
    }

    /// The longest key that `text` starts with.
    pub(super) fn longest_prefix(&self, text: &[u8]) -> Option<(usize, u32)> {
        self.prefixes(text).last()
    }

    /// The id of exactly this key.
    pub(super) fn get(&self, key: &[u8]) -> Option<u32> {
        let mut node = 0;
        for &byte in key {
            node = self.child(node, byte)?;
        }
        Some(self.units[node].value).filter(|&value| value != NO_VALUE)
    }
}

/// The array under construction, its free slots in a doubly linked list through `next` and
/// `previous`, with slot 0 (the root, never free) as both ends.
struct Builder {
    units: Vec<Unit>,
    next: Vec<u32>,
    previous: Vec<u32>,
}

impl Builder {
    fn new() -> Self {
        let mut builder = Self {
            units: Vec::new(),
            next: Vec::new(),
            previous: Vec::new(),
        };
        builder.units.push(Unit {
            base: 0,
            parent: NOBODY,
            value: NO_VALUE,
        });
        builder.next.push(0);
        builder.previous.push(0);
        builder.grow(BLOCK);
        builder
    }

    /// Adds free slots up to `len` in all.
    fn grow(&mut self, len: usize) {
        for slot in self.units.len()..len {
            let last = self.previous[0];
            self.units.push(Unit {
                base: 0,
                parent: FREE,
                value: NO_VALUE,
            });
            self.next[last as usize] = slot as u32;
            self.next.push(0);
            self.previous.push(last);
            self.previous[0] = slot as u32;
        }
    }

    /// A base whose slots for all these labels are free.
    fn place(&mut self, children: &[(u8, usize)]) -> usize {
        let first_label = usize::from(children[0].0);
        // One child fits anywhere, so it fills the oldest gap; several look among the newest.
        let mut slot = if children.len() == 1 {
            self.next[0] as usize
        } else {
            self.previous[0] as usize
        };
        for _ in 0..MAX_TRIES {
            if slot == 0 {
                break;
            }
            let base = slot ^ first_label;
            let fits =
                |&(label, _): &(u8, usize)| self.units[base ^ usize::from(label)].parent == FREE;
            if children.iter().all(fits) {
                return base;
            }
            slot = self.previous[slot] as usize;
        }
        let base = self.units.len();
        self.grow(base + BLOCK);
        base
    }

    fn occupy(&mut self, slot: usize, parent: u32) {
        let (before, after) = (self.previous[slot], self.next[slot]);
        self.next[before as usize] = after;
        self.previous[after as usize] = before;
        self.units[slot].parent = parent;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn trie(keys: &[&str]) -> Trie {
        let mut sorted: Vec<(&[u8], u32)> =
            (0..).zip(keys).map(|(i, k)| (k.as_bytes(), i)).collect();
        sorted.sort_unstable();
        Trie::from_sorted(&sorted)
    }

    #[test]
    fn finds_every_prefix_and_nothing_else() {
        let trie = trie(&["a", "abc", "ab\u{0}", "好", "你好", "b"]);
        let found: Vec<_> = trie.prefixes(b"abcd").collect();
        assert_eq!(found, [(1, 0), (3, 1)]);
        assert_eq!(trie.longest_prefix("你好吗".as_bytes()), Some((6, 4)));
        assert_eq!(trie.get("你".as_bytes()), None);
        assert_eq!(trie.get(b"ab\0"), Some(2));
        assert_eq!(trie.get(b""), None);
        assert_eq!(trie.get(b"c"), None);
    }

    #[test]
    fn holds_all_two_byte_keys() {
        let keys: Vec<[u8; 2]> = (0..=u16::MAX).map(u16::to_be_bytes).collect();
        let sorted: Vec<(&[u8], u32)> = keys.iter().zip(0..).map(|(k, i)| (&k[..], i)).collect();
        let trie = Trie::from_sorted(&sorted);
        for (key, id) in sorted {
            assert_eq!(trie.get(key), Some(id));
        }
        assert!(trie.units.len() < 70_000, "{} slots", trie.units.len());
    }

    #[test]
    fn an_empty_trie_finds_nothing() {
        assert_eq!(Trie::from_sorted(&[]).longest_prefix(b"\0\0"), None);
    }
}
