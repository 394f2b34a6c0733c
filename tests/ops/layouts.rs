//! How heads lie in rows, for the ops that work on heads.

use mp_train::backend::{AttentionLayout, HeadLayout};

/// Queries of all heads, then keys, then values, then a gap that belongs to nobody.
pub fn side_by_side(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionLayout {
    with_gap(heads, kv_heads, head_dim, 16)
}

fn with_gap(heads: usize, kv_heads: usize, head_dim: usize, gap: usize) -> AttentionLayout {
    let part = |heads_before: usize| HeadLayout {
        row: (heads + 2 * kv_heads) * head_dim + gap,
        offset: heads_before * head_dim,
        stride: head_dim,
    };
    AttentionLayout {
        heads,
        kv_heads,
        head_dim,
        query: part(0),
        key: part(heads),
        value: part(heads + kv_heads),
    }
}

/// The place of one element.
pub fn place(layout: HeadLayout, row: usize, head: usize, index: usize) -> usize {
    row * layout.row + layout.offset + head * layout.stride + index
}

pub fn describe(layout: &AttentionLayout) -> String {
    format!(
        "heads {}/{} of {}, row {}",
        layout.heads, layout.kv_heads, layout.head_dim, layout.query.row
    )
}

#[test]
fn concatenated_heads_stand_side_by_side_without_a_gap() {
    for (heads, kv_heads, head_dim) in [(1, 1, 1), (3, 3, 6), (6, 2, 80), (32, 2, 128)] {
        let layout = AttentionLayout::concatenated(heads, kv_heads, head_dim);
        assert_eq!(layout, with_gap(heads, kv_heads, head_dim, 0));
    }
}
