//! Rotary position embedding.

use multiversion::multiversion;

use super::Cpu;
use super::threads::Threads;
use super::transpose::prefetch;
use crate::backend::{AttentionLayout, Element, HeadLayout, RotaryPositions};

/// Cosines and sines by position.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

impl<'a> Table<'a> {
    /// Cosines and sines of one position, of which there are `width`.
    fn row(&self, position: u32, width: usize) -> Table<'a> {
        let places = position as usize * width..(position as usize + 1) * width;
        Table {
            cos: &self.cos[places.clone()],
            sin: &self.sin[places],
        }
    }
}

/// The pair `(a, b)` turned by an angle.
#[inline(always)]
fn turn<E: Element>(a: &mut E, b: &mut E, cos: f32, sin: f32) {
    let (x, y) = (a.to_f32(), b.to_f32());
    *a = E::from_f32(x * cos - y * sin);
    *b = E::from_f32(y * cos + x * sin);
}

/// Pairs are turned so many at a time: a quarter of a head is too short for the compiler's own unrolling.
const LANES: usize = 16;
/// Values ahead of a head that memory is asked for: the gaps between queries and keys hide from the processor
/// what comes next.
const AHEAD: usize = 1024;

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn turn_halves<E: Element>(low: &mut [E], high: &mut [E], angles: Table<'_>, sign: f32) {
    let (low, low_tail) = low.as_chunks_mut::<LANES>();
    let (high, high_tail) = high.as_chunks_mut::<LANES>();
    let (cos, cos_tail) = angles.cos.as_chunks::<LANES>();
    let (sin, sin_tail) = angles.sin.as_chunks::<LANES>();
    for ((low, high), (cos, sin)) in low.iter_mut().zip(high).zip(cos.iter().zip(sin)) {
        let (mut a, mut b) = (*low, *high);
        for lane in 0..LANES {
            turn(&mut a[lane], &mut b[lane], cos[lane], sign * sin[lane]);
        }
        (*low, *high) = (a, b);
    }
    let tails = cos_tail.iter().zip(sin_tail);
    for ((low, high), (cos, sin)) in low_tail.iter_mut().zip(high_tail).zip(tails) {
        turn(low, high, *cos, sign * sin);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn turn_pairs<E: Element>(pairs: &mut [[E; 2]], angles: Table<'_>, sign: f32) {
    let angles = angles.cos.iter().zip(angles.sin);
    for ([even, odd], (cos, sin)) in pairs.iter_mut().zip(angles) {
        turn(even, odd, *cos, sign * sin);
    }
}

pub fn rotary<E: Element>(
    threads: &Threads,
    x: &mut [E],
    table: Table<'_>,
    positions: RotaryPositions<'_, Cpu<E>>,
    layout: &AttentionLayout,
    rows: usize,
    inverse: bool,
) {
    let row_width = layout.query.row;
    let sign = if inverse { -1.0 } else { 1.0 };
    let turn_head = |row: usize, head: &mut [E]| match positions {
        RotaryPositions::TwoDimensional {
            position,
            block_position,
        } => {
            let quarter = head.len() / 4;
            let halves = head.chunks_exact_mut(2 * quarter);
            for (half, positions) in halves.zip([position, block_position]) {
                let (low, high) = half.split_at_mut(quarter);
                turn_halves(low, high, table.row(positions[row], quarter), sign);
            }
        }
        RotaryPositions::Interleaved { position, width } => {
            let (pairs, _) = head[..width].as_chunks_mut::<2>();
            turn_pairs(pairs, table.row(position[row], width / 2), sign);
        }
    };
    threads.rows(&mut x[..rows * row_width], row_width, |row, x| {
        let mut turn_heads = |place: HeadLayout, heads: usize| {
            for head in 0..heads {
                let start = place.offset + head * place.stride;
                for line in (start..start + layout.head_dim).step_by(LANES) {
                    prefetch(x, line + AHEAD);
                }
                turn_head(row, &mut x[start..start + layout.head_dim]);
            }
        };
        turn_heads(layout.query, layout.heads);
        turn_heads(layout.key, layout.kv_heads);
    });
}
