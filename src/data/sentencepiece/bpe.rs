//! BPE: neighbours are merged, best score first (Sennrich et al. 2016), as the C++ library does it.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::Segment;
use super::model_proto::PieceKind;
use super::vocabulary::Vocabulary;

const NONE: usize = usize::MAX;

/// A stretch of text; empty once it was merged into its left neighbour.
struct Symbol {
    start: usize,
    len: usize,
    previous: usize,
    next: usize,
    /// A user-defined piece, which merges with nothing.
    frozen: bool,
}

/// Two neighbours that make a piece together.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    /// Of both; when it no longer fits, one of the two has changed since.
    len: usize,
}

impl Ord for Merge {
    /// The better score is greater, then the one further left. `+ 0.0` makes -0 equal to 0.
    fn cmp(&self, other: &Self) -> Ordering {
        let score = (self.score + 0.0).total_cmp(&(other.score + 0.0));
        score.then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

/// Cuts normalised text.
pub(super) fn segment(vocabulary: &Vocabulary, text: &str) -> Vec<Segment> {
    let mut merger = Merger {
        vocabulary,
        text,
        symbols: symbols(vocabulary, text),
        agenda: BinaryHeap::new(),
        unused: HashMap::new(),
    };
    for right in 1..merger.symbols.len() {
        merger.propose(right - 1, right);
    }
    while let Some(merge) = merger.agenda.pop() {
        merger.apply(&merge);
    }
    merger.finish()
}

/// Characters and user-defined pieces, linked in order.
fn symbols(vocabulary: &Vocabulary, text: &str) -> Vec<Symbol> {
    let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
    let mut start = 0;
    while let Some(character) = text[start..].chars().next() {
        let user_defined = vocabulary
            .user_defined
            .longest_prefix(&text.as_bytes()[start..]);
        let len = user_defined.map_or(character.len_utf8(), |(len, _)| len);
        let index = symbols.len();
        symbols.push(Symbol {
            start,
            len,
            previous: index.checked_sub(1).unwrap_or(NONE),
            next: if start + len < text.len() {
                index + 1
            } else {
                NONE
            },
            frozen: user_defined.is_some(),
        });
        start += len;
    }
    symbols
}

struct Merger<'a> {
    vocabulary: &'a Vocabulary,
    text: &'a str,
    symbols: Vec<Symbol>,
    agenda: BinaryHeap<Merge>,
    /// For an UNUSED piece, the length of its left part when it was last proposed.
    unused: HashMap<u32, usize>,
}

impl Merger<'_> {
    /// Puts the pair on the agenda when it makes a piece.
    fn propose(&mut self, left: usize, right: usize) {
        if left == NONE || right == NONE {
            return;
        }
        let (first, second) = (&self.symbols[left], &self.symbols[right]);
        if first.frozen || second.frozen {
            return;
        }
        let len = first.len + second.len;
        let piece = &self.text.as_bytes()[first.start..first.start + len];
        let Some(id) = self.vocabulary.text.get(piece) else {
            return;
        };
        let facts = self.vocabulary.facts[id as usize];
        if facts.kind == PieceKind::Unused {
            self.unused.insert(id, first.len);
        }
        self.agenda.push(Merge {
            score: facts.score,
            left,
            right,
            len,
        });
    }

    fn apply(&mut self, merge: &Merge) {
        let (left, right) = (&self.symbols[merge.left], &self.symbols[merge.right]);
        if left.len == 0 || right.len == 0 || left.len + right.len != merge.len {
            return;
        }
        let (previous, next) = (left.previous, right.next);
        self.symbols[merge.right].len = 0;
        self.symbols[merge.left].len = merge.len;
        self.symbols[merge.left].next = next;
        if next != NONE {
            self.symbols[next].previous = merge.left;
        }
        self.propose(previous, merge.left);
        self.propose(merge.left, next);
    }

    fn finish(self) -> Vec<Segment> {
        let mut segments = Vec::new();
        for symbol in self.symbols.iter().filter(|symbol| symbol.len > 0) {
            // UNUSED pieces are split back into the parts that they were merged from.
            let mut open = vec![(symbol.start, symbol.start + symbol.len)];
            while let Some((start, end)) = open.pop() {
                let id = self.vocabulary.id_of(&self.text[start..end]);
                let id = id.unwrap_or(self.vocabulary.unk_id);
                match self.unused.get(&id) {
                    Some(left) => {
                        open.push((start + left, end));
                        open.push((start, start + left));
                    }
                    None => segments.push(Segment { id, end }),
                }
            }
        }
        segments
    }
}
