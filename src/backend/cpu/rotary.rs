//! Two-dimensional rotary position embedding.

use super::threads::Threads;
use crate::backend::{AttentionLayout, Element, HeadLayout};

/// Cosines and sines by position, `[positions, D / 4]`.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

pub fn rotary<E: Element>(
    threads: &Threads,
    x: &mut [E],
    table: Table<'_>,
    positions: [&[u32]; 2],
    layout: &AttentionLayout,
    rows: usize,
    inverse: bool,
) {
    let row_width = layout.query.row;
    let quarter = layout.head_dim / 4;
    let sign = if inverse { -1.0 } else { 1.0 };
    threads.rows(&mut x[..rows * row_width], row_width, |row, x| {
        let mut rotate = |place: HeadLayout, heads: usize| {
            for head in 0..heads {
                let head = &mut x[place.offset + head * place.stride..][..layout.head_dim];
                for (half, positions) in head.chunks_exact_mut(2 * quarter).zip(positions) {
                    let first = positions[row] as usize * quarter;
                    let cos = &table.cos[first..first + quarter];
                    let sin = &table.sin[first..first + quarter];
                    let (low, high) = half.split_at_mut(quarter);
                    for j in 0..quarter {
                        let (a, b) = (low[j].to_f32(), high[j].to_f32());
                        let (cos, sin) = (cos[j], sign * sin[j]);
                        low[j] = E::from_f32(a * cos - b * sin);
                        high[j] = E::from_f32(b * cos + a * sin);
                    }
                }
            }
        };
        rotate(layout.query, layout.heads);
        rotate(layout.key, layout.kv_heads);
    });
}
