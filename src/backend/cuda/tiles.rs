//! Attention's work cut into tiles of 64 queries or 64 keys inside one sequence, heaviest first, so
//! that the last blocks to start are short ones.

use std::cmp::Reverse;

use crate::backend::Span;

/// Rows of a tile: `TILE_ROWS` of kernels/attention.cuh.
const ROWS: usize = 64;

/// `Tile` of kernels/attention.cuh: sequence, and place among its tiles.
type Tile = [u32; WORDS];

/// Words of a tile.
pub(super) const WORDS: usize = 2;

/// Tiles of `sequences` sequences of together `rows` rows, each with a prefix, at most.
pub(super) fn most(rows: usize, sequences: usize, prefix_len: usize) -> usize {
    rows / ROWS + sequences * (1 + prefix_len.div_ceil(ROWS))
}

/// Keys of the sequence that query i sees.
fn visible(span: &Span, i: usize) -> usize {
    let t = span.kv_len - span.q_len + i;
    (t + 1).max(span.context_length).min(span.kv_len)
}

/// First query that sees key k.
fn first_observer(span: &Span, k: usize) -> usize {
    match k < span.context_length {
        true => 0,
        false => k.saturating_sub(span.kv_len - span.q_len),
    }
}

fn heaviest_first(tiles: impl Iterator<Item = (usize, usize, usize)>) -> Vec<Tile> {
    let mut tiles: Vec<_> = tiles.collect();
    tiles.sort_by_key(|&(_, _, weight)| Reverse(weight));
    let word = |(sequence, index, _)| [sequence as u32, index as u32];
    tiles.into_iter().map(word).collect()
}

/// Tiles of queries, by the keys that their last query sees.
pub(super) fn of_queries(spans: &[Span]) -> Vec<Tile> {
    heaviest_first(spans.iter().enumerate().flat_map(|(sequence, span)| {
        (0..span.q_len.div_ceil(ROWS)).map(move |index| {
            let last = ((index + 1) * ROWS).min(span.q_len) - 1;
            (sequence, index, visible(span, last))
        })
    }))
}

/// Tiles of keys, those of the prefix before those of the sequence in its count, by the queries that
/// see them; with `own_alone` those of the prefix are left out.
pub(super) fn of_keys(spans: &[Span], prefix_len: usize, own_alone: bool) -> Vec<Tile> {
    let prefix_tiles = prefix_len.div_ceil(ROWS);
    let first = if own_alone { prefix_tiles } else { 0 };
    heaviest_first(spans.iter().enumerate().flat_map(|(sequence, span)| {
        (first..prefix_tiles + span.kv_len.div_ceil(ROWS)).map(move |index| {
            let unseen = match index.checked_sub(prefix_tiles) {
                Some(own) => first_observer(span, own * ROWS),
                None => 0,
            };
            (sequence, index, span.q_len - unseen)
        })
    }))
}

#[cfg(test)]
mod tests {
    use super::{most, of_keys, of_queries};
    use crate::backend::Span;

    fn span(q_len: usize, kv_len: usize, context_length: usize) -> Span {
        Span {
            q_start: 0,
            q_len,
            kv_start: 0,
            kv_len,
            context_length,
        }
    }

    #[test]
    fn every_query_once_and_the_heaviest_first() {
        // Visible keys of the last query of each tile: 64, 65; 100; 200.
        let spans = [span(65, 65, 0), span(1, 100, 0), span(3, 200, 199)];
        assert_eq!(of_queries(&spans), [[2, 0], [1, 0], [0, 1], [0, 0]]);
    }

    #[test]
    fn no_micro_batch_has_more_tiles_than_there_is_room_for() {
        let spans = [
            span(65, 65, 0),
            span(1, 1, 1),
            span(129, 129, 7),
            span(64, 64, 0),
        ];
        let rows = spans.iter().map(|span| span.q_len).sum();
        assert!(of_queries(&spans).len() <= most(rows, spans.len(), 0));
        for prefix_len in [0, 1, 64, 65] {
            let tiles = of_keys(&spans, prefix_len, false);
            assert!(tiles.len() <= most(rows, spans.len(), prefix_len));
        }
    }

    #[test]
    fn a_context_makes_early_tiles_as_heavy_as_late_ones() {
        assert_eq!(of_queries(&[span(129, 129, 129)]), [[0, 0], [0, 1], [0, 2]]);
        assert_eq!(of_queries(&[span(129, 129, 0)]), [[0, 2], [0, 1], [0, 0]]);
    }

    #[test]
    fn keys_of_the_prefix_come_first_and_can_be_left_out() {
        // Queries that see each tile of keys: prefix 70, 70; own 70, 6 or (context 65) 70.
        let causal = [span(70, 70, 0)];
        assert_eq!(
            of_keys(&causal, 65, false),
            [[0, 0], [0, 1], [0, 2], [0, 3]]
        );
        assert_eq!(of_keys(&causal, 65, true), [[0, 2], [0, 3]]);
        let spans = [span(70, 70, 0), span(10, 10, 0)];
        assert_eq!(of_keys(&spans, 0, false), [[0, 0], [1, 0], [0, 1]]);
        let spans = [span(70, 70, 65), span(10, 10, 0)];
        assert_eq!(of_keys(&spans, 0, false), [[0, 0], [0, 1], [1, 0]]);
    }
}
