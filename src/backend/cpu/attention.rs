//! Softmax attention inside each sequence, forward and backward.
//!
//! One task per sequence and key/value head: its keys and values (prefix first) are gathered once,
//! as f32, then queries are taken in tiles, so that no more than `QUERY_TILE` rows of scores exist.

use super::matmul::{Extent, Matrix, multiply};
use super::reduce;
use super::threads::{Scattered, Threads};
use crate::backend::{AttentionLayout, Element, HeadLayout, Span, Work};

/// Query rows whose scores are held at once.
const QUERY_TILE: usize = 64;

/// Prefix keys and values in host memory.
#[derive(Clone, Copy)]
pub struct PrefixRows<'a, E> {
    /// `[P, 2, G, D]`, or one of these per sequence.
    pub key_value: &'a [E],
    /// P.
    pub len: usize,
    /// Whether each sequence has its own.
    pub per_sequence: bool,
}

/// What forward and backward share: where things are and who sees whom.
#[derive(Clone, Copy)]
pub struct Geometry<'a> {
    /// Where heads lie.
    pub layout: &'a AttentionLayout,
    /// The sequences.
    pub spans: &'a [Span],
    /// Factor on the scores.
    pub scale: f32,
}

/// One sequence and key/value head: gathered keys and values, prefix rows first.
struct Head {
    span: Span,
    kv_head: usize,
    prefix_len: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

fn gather<E: Element>(
    out: &mut [f32],
    x: &[E],
    place: HeadLayout,
    head: usize,
    first_row: usize,
    dim: usize,
) {
    for (row, out) in out.chunks_exact_mut(dim).enumerate() {
        let start = (first_row + row) * place.row + place.offset + head * place.stride;
        E::widen(out, &x[start..start + dim]);
    }
}

impl Head {
    fn new<E: Element>(
        geometry: Geometry<'_>,
        task: usize,
        key_value: &[E],
        prefix: Option<PrefixRows<'_, E>>,
    ) -> Self {
        let layout = geometry.layout;
        let dim = layout.head_dim;
        let (sequence, kv_head) = (task / layout.kv_heads, task % layout.kv_heads);
        let span = geometry.spans[sequence];
        let prefix_len = prefix.map_or(0, |prefix| prefix.len);
        let rows = prefix_len + span.kv_len;
        let (mut keys, mut values) = (vec![0.0; rows * dim], vec![0.0; rows * dim]);
        if let Some(prefix) = prefix {
            let width = layout.key_value_width();
            let first = if prefix.per_sequence {
                sequence * prefix.len
            } else {
                0
            };
            let place = |offset| HeadLayout {
                row: width,
                offset,
                stride: dim,
            };
            let len = prefix.len * dim;
            gather(
                &mut keys[..len],
                prefix.key_value,
                place(0),
                kv_head,
                first,
                dim,
            );
            gather(
                &mut values[..len],
                prefix.key_value,
                place(width / 2),
                kv_head,
                first,
                dim,
            );
        }
        let own = prefix_len * dim;
        gather(
            &mut keys[own..],
            key_value,
            layout.key,
            kv_head,
            span.kv_start,
            dim,
        );
        gather(
            &mut values[own..],
            key_value,
            layout.value,
            kv_head,
            span.kv_start,
            dim,
        );
        Head {
            span,
            kv_head,
            prefix_len,
            keys,
            values,
        }
    }

    /// Prefix and own keys that query `i` of the span sees, counted from the start.
    fn visible(&self, i: usize) -> usize {
        let t = self.span.kv_len - self.span.q_len + i;
        let own = (t + 1).max(self.span.context_length).min(self.span.kv_len);
        self.prefix_len + own
    }

    /// Tiles of queries, as (first, how many, keys that the last of them sees).
    fn tiles(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        (0..self.span.q_len).step_by(QUERY_TILE).map(|first| {
            let rows = QUERY_TILE.min(self.span.q_len - first);
            (first, rows, self.visible(first + rows - 1))
        })
    }
}

pub fn attention<E: Element>(
    threads: &Threads,
    out: &mut [E],
    lse: &mut [f32],
    query: &[E],
    key_value: &[E],
    prefix: Option<PrefixRows<'_, E>>,
    geometry: Geometry<'_>,
) {
    let _counting = threads.clock.count(Work::Attention);
    let layout = geometry.layout;
    let dim = layout.head_dim;
    let group = layout.heads / layout.kv_heads;
    let (out, lse) = (Scattered::new(out), Scattered::new(lse));
    threads.tasks(geometry.spans.len() * layout.kv_heads, |task| {
        let head = Head::new(geometry, task, key_value, prefix);
        let mut q = vec![0.0f32; QUERY_TILE * dim];
        let mut scores = vec![0.0f32; QUERY_TILE * (head.prefix_len + head.span.kv_len)];
        let mut context = vec![0.0f32; QUERY_TILE * dim];
        for q_head in head.kv_head * group..(head.kv_head + 1) * group {
            for (first, rows, keys) in head.tiles() {
                let row = head.span.q_start + first;
                gather(&mut q[..rows * dim], query, layout.query, q_head, row, dim);
                let extent = Extent {
                    m: rows,
                    n: keys,
                    k: dim,
                };
                let transposed = Matrix::transposed(&head.keys, dim);
                multiply(
                    &mut scores,
                    keys,
                    extent,
                    Matrix::rows(&q, dim),
                    transposed,
                    geometry.scale,
                    false,
                );
                for (i, scores) in scores.chunks_exact_mut(keys).take(rows).enumerate() {
                    let (seen, hidden) = scores.split_at_mut(head.visible(first + i));
                    let max = reduce::max(seen);
                    for score in seen.iter_mut() {
                        *score = reduce::exp(*score - max);
                    }
                    let sum = reduce::sum(seen);
                    for score in seen {
                        *score /= sum;
                    }
                    hidden.fill(0.0);
                    // SAFETY: one place per query and head, and this task alone has this head.
                    unsafe { lse.at((row + i) * layout.heads + q_head, 1) }.fill(max + sum.ln());
                }
                let extent = Extent {
                    m: rows,
                    n: dim,
                    k: keys,
                };
                let (probabilities, values) =
                    (Matrix::rows(&scores, keys), Matrix::rows(&head.values, dim));
                multiply(&mut context, dim, extent, probabilities, values, 1.0, false);
                for (i, context) in context.chunks_exact(dim).take(rows).enumerate() {
                    // SAFETY: as above, `dim` places per query and head.
                    let out = unsafe { out.at(((row + i) * layout.heads + q_head) * dim, dim) };
                    for (out, &context) in out.iter_mut().zip(context) {
                        *out = E::from_f32(context);
                    }
                }
            }
        }
    });
}

/// What the forward pass left, and the gradient of its output.
#[derive(Clone, Copy)]
pub struct Saved<'a, E> {
    /// Gradient of the output, `[T, N, D]`.
    pub dout: &'a [E],
    /// Output, `[T, N, D]`.
    pub out: &'a [E],
    /// Log of the sum of exponentials, `[T, N]`.
    pub lse: &'a [f32],
    /// Queries, keys and values.
    pub qkv: &'a [E],
}

/// With `p = exp(s - lse)`: `dv = pᵀ do`, `ds = p (do vᵀ - do·o)`, `dq = scale ds k`,
/// `dk = scale dsᵀ q` (Dao 2023, section 3.1).
pub fn attention_backward<E: Element>(
    threads: &Threads,
    dqkv: &mut [E],
    dprefix: Option<&mut [f32]>,
    saved: Saved<'_, E>,
    prefix: Option<PrefixRows<'_, E>>,
    geometry: Geometry<'_>,
) {
    let _counting = threads.clock.count(Work::Attention);
    let layout = geometry.layout;
    let dim = layout.head_dim;
    let group = layout.heads / layout.kv_heads;
    let dqkv = Scattered::new(dqkv);
    let dprefix = dprefix.map(Scattered::new);
    let contiguous = HeadLayout {
        row: layout.heads * dim,
        offset: 0,
        stride: dim,
    };
    threads.tasks(geometry.spans.len() * layout.kv_heads, |task| {
        let head = Head::new(geometry, task, saved.qkv, prefix);
        let all = head.prefix_len + head.span.kv_len;
        let (mut dkeys, mut dvalues) = (vec![0.0f32; all * dim], vec![0.0f32; all * dim]);
        let mut tile = vec![0.0f32; 4 * QUERY_TILE * dim];
        let (q, rest) = tile.split_at_mut(QUERY_TILE * dim);
        let (dout, rest) = rest.split_at_mut(QUERY_TILE * dim);
        let (out, dq) = rest.split_at_mut(QUERY_TILE * dim);
        let mut p = vec![0.0f32; QUERY_TILE * all];
        let mut ds = vec![0.0f32; QUERY_TILE * all];
        let write = |place: HeadLayout, head: usize, row: usize, values: &[f32]| {
            let start = row * place.row + place.offset + head * place.stride;
            // SAFETY: query heads of this group and this key/value head belong to this task alone.
            let target = unsafe { dqkv.at(start, dim) };
            for (target, &value) in target.iter_mut().zip(values) {
                *target = E::from_f32(value);
            }
        };
        for q_head in head.kv_head * group..(head.kv_head + 1) * group {
            for (first, rows, keys) in head.tiles() {
                let row = head.span.q_start + first;
                gather(
                    &mut q[..rows * dim],
                    saved.qkv,
                    layout.query,
                    q_head,
                    row,
                    dim,
                );
                gather(
                    &mut dout[..rows * dim],
                    saved.dout,
                    contiguous,
                    q_head,
                    row,
                    dim,
                );
                gather(
                    &mut out[..rows * dim],
                    saved.out,
                    contiguous,
                    q_head,
                    row,
                    dim,
                );
                let extent = Extent {
                    m: rows,
                    n: keys,
                    k: dim,
                };
                let transposed_keys = Matrix::transposed(&head.keys, dim);
                let transposed_values = Matrix::transposed(&head.values, dim);
                let scale = geometry.scale;
                multiply(
                    &mut p,
                    keys,
                    extent,
                    Matrix::rows(q, dim),
                    transposed_keys,
                    scale,
                    false,
                );
                multiply(
                    &mut ds,
                    keys,
                    extent,
                    Matrix::rows(dout, dim),
                    transposed_values,
                    1.0,
                    false,
                );
                for i in 0..rows {
                    let lse = saved.lse[(row + i) * layout.heads + q_head];
                    let delta =
                        reduce::dot(&dout[i * dim..(i + 1) * dim], &out[i * dim..(i + 1) * dim]);
                    let seen = head.visible(first + i);
                    let (p, ds) = (
                        &mut p[i * keys..(i + 1) * keys],
                        &mut ds[i * keys..(i + 1) * keys],
                    );
                    for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                        *p = reduce::exp(*p - lse);
                        *ds = *p * (*ds - delta);
                    }
                    p[seen..].fill(0.0);
                    ds[seen..].fill(0.0);
                }
                let extent = Extent {
                    m: rows,
                    n: dim,
                    k: keys,
                };
                let key_rows = Matrix::rows(&head.keys, dim);
                multiply(
                    dq,
                    dim,
                    extent,
                    Matrix::rows(&ds, keys),
                    key_rows,
                    scale,
                    false,
                );
                for (i, dq) in dq.chunks_exact(dim).take(rows).enumerate() {
                    write(layout.query, q_head, row + i, dq);
                }
                let extent = Extent {
                    m: keys,
                    n: dim,
                    k: rows,
                };
                let (dst, pt) = (Matrix::transposed(&ds, keys), Matrix::transposed(&p, keys));
                multiply(
                    &mut dkeys,
                    dim,
                    extent,
                    dst,
                    Matrix::rows(q, dim),
                    scale,
                    true,
                );
                multiply(
                    &mut dvalues,
                    dim,
                    extent,
                    pt,
                    Matrix::rows(dout, dim),
                    1.0,
                    true,
                );
            }
        }
        let own = head.prefix_len * dim;
        for (place, gradient) in [(layout.key, &dkeys), (layout.value, &dvalues)] {
            for (row, values) in gradient[own..].chunks_exact(dim).enumerate() {
                write(place, head.kv_head, head.span.kv_start + row, values);
            }
        }
        if let Some(dprefix) = &dprefix {
            let width = layout.key_value_width();
            let first = task / layout.kv_heads * head.prefix_len;
            for (offset, gradient) in [(0, &dkeys), (width / 2, &dvalues)] {
                for (row, values) in gradient[..own].chunks_exact(dim).enumerate() {
                    let start = (first + row) * width + offset + head.kv_head * dim;
                    // SAFETY: one place per sequence, prefix row and key/value head.
                    unsafe { dprefix.at(start, dim) }.copy_from_slice(values);
                }
            }
        }
    });
}
