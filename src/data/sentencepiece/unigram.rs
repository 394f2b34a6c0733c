//! UNIGRAM: the most probable segmentation (Kudo 2018), with the ties of the C++ library.

use super::Segment;
use super::model_proto::PieceKind;
use super::vocabulary::Vocabulary;

/// How much worse than the worst piece an unknown character is.
const UNK_PENALTY: f32 = 10.0;

/// The best path that ends at a byte.
#[derive(Clone, Copy)]
struct BestPath {
    score: f32,
    id: u32,
    /// Length of its last piece; 0: no path ends here yet.
    len: u32,
}

impl BestPath {
    /// Strictly better wins, so of equal candidates the first stays. The comparison is in f64 and
    /// the stored score in f32: with one precision throughout, ties fall otherwise than in
    /// sentencepiece 0.1.99, and so do ids.
    fn offer(&mut self, score: f64, id: u32, len: usize) {
        if self.len == 0 || score > f64::from(self.score) {
            *self = Self {
                score: score as f32,
                id,
                len: len as u32,
            };
        }
    }
}

/// Cuts normalised text.
pub(super) fn segment(vocabulary: &Vocabulary, text: &str) -> Vec<Segment> {
    let unk_score = vocabulary.min_score - UNK_PENALTY;
    let unreached = BestPath {
        score: 0.0,
        id: vocabulary.unk_id,
        len: 0,
    };
    let mut best = vec![unreached; text.len() + 1];
    for (at, character) in text.char_indices() {
        let here = best[at].score;
        let mut covered = false;
        for (len, id) in vocabulary.text.prefixes(&text.as_bytes()[at..]) {
            let piece = vocabulary.facts[id as usize];
            let score = match piece.kind {
                PieceKind::Unused => continue,
                PieceKind::UserDefined => f64::from(len as f32 * vocabulary.max_score) - 0.1,
                _ => f64::from(piece.score),
            };
            best[at + len].offer(score + f64::from(here), id, len);
            covered |= len == character.len_utf8();
        }
        if !covered {
            let len = character.len_utf8();
            best[at + len].offer(f64::from(unk_score + here), vocabulary.unk_id, len);
        }
    }

    let mut segments = Vec::new();
    let mut end = text.len();
    while end > 0 {
        let last = best[end];
        segments.push(Segment { id: last.id, end });
        end -= last.len as usize;
    }
    segments.reverse();
    segments
}
