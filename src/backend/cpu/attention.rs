//! Softmax attention inside each sequence, forward and backward.
//!
//! One task per sequence and key/value head: its keys and values (prefix first) are gathered once, as f32
//! and in the order that products want, then queries are taken in tiles, so that no more than `QUERY_TILE`
//! rows of scores exist, of the keys that one of the tile's queries sees.

use multiversion::multiversion;

use super::Cpu;
use super::matmul::multiply;
use super::operands::{Extent, Matrix, Order, Right};
use super::reduce;
use super::threads::{LINE, Scattered, Threads, parts, parts_len, with_scratch};
use super::transpose::prefetch;
use crate::backend::{AttentionLayout, Element, HeadLayout, Prefix, Span, Work};

/// Rows of a head, far from each other, that memory is asked for before they are gathered.
const ROWS_AHEAD: usize = 8;
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

impl<'a, E: Element> PrefixRows<'a, E> {
    /// Those of the CPU's buffers.
    pub fn of(prefix: &Prefix<'a, Cpu<E>>) -> Self {
        PrefixRows {
            key_value: prefix.key_value,
            len: prefix.len,
            per_sequence: prefix.per_sequence,
        }
    }
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

/// One sequence and key/value head.
struct Head<'a, E> {
    geometry: Geometry<'a>,
    sequence: usize,
    span: Span,
    kv_head: usize,
    prefix: Option<PrefixRows<'a, E>>,
    prefix_len: usize,
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
        for line in (start..start + dim).step_by(LINE) {
            prefetch(x, line + ROWS_AHEAD * place.row);
        }
        E::widen(out, &x[start..start + dim]);
    }
}

impl<'a, E: Element> Head<'a, E> {
    fn new(geometry: Geometry<'a>, task: usize, prefix: Option<PrefixRows<'a, E>>) -> Self {
        let kv_heads = geometry.layout.kv_heads;
        let sequence = task / kv_heads;
        Head {
            geometry,
            sequence,
            span: geometry.spans[sequence],
            kv_head: task % kv_heads,
            prefix,
            prefix_len: prefix.map_or(0, |prefix| prefix.len),
        }
    }

    /// Keys, the prefix's and its own.
    fn keys(&self) -> usize {
        self.prefix_len + self.span.kv_len
    }

    /// Fills `[keys, D]`: from the prefix, whose rows have this head at `prefix_offset` for head 0, and
    /// from `x`, where heads lie at `place`.
    fn gather(&self, out: &mut [f32], x: &[E], place: HeadLayout, prefix_offset: usize) {
        let layout = self.geometry.layout;
        let dim = layout.head_dim;
        let (before, own) = out.split_at_mut(self.prefix_len * dim);
        if let Some(prefix) = self.prefix {
            let first = if prefix.per_sequence {
                self.sequence * prefix.len
            } else {
                0
            };
            let place = HeadLayout {
                row: layout.key_value_width(),
                offset: prefix_offset,
                stride: dim,
            };
            gather(before, prefix.key_value, place, self.kv_head, first, dim);
        }
        gather(own, x, place, self.kv_head, self.span.kv_start, dim);
    }

    fn gather_keys(&self, out: &mut [f32], x: &[E]) {
        self.gather(out, x, self.geometry.layout.key, 0);
    }

    fn gather_values(&self, out: &mut [f32], x: &[E]) {
        let layout = self.geometry.layout;
        self.gather(out, x, layout.value, layout.key_value_width() / 2);
    }

    /// Keys or values `[keys, D]` as the right operand of products with a column for each key.
    fn by_key<'m>(&self, order: Order, x: &'m [f32], memory: &'m mut [f32]) -> Right<'m> {
        let dim = self.geometry.layout.head_dim;
        Right::new(order, Matrix::transposed(x, dim), dim, self.keys(), memory)
    }

    /// Memory for [`Head::by_key`].
    fn by_key_len(&self, order: Order) -> usize {
        let dim = self.geometry.layout.head_dim;
        Right::len(order, Matrix::<f32>::transposed(&[], dim), dim, self.keys())
    }

    /// Keys or values `[keys, D]` as the right operand of sums over keys.
    fn by_value<'m>(&self, order: Order, x: &'m [f32], memory: &'m mut [f32]) -> Right<'m> {
        let dim = self.geometry.layout.head_dim;
        Right::new(order, Matrix::rows(x, dim), self.keys(), dim, memory)
    }

    /// Memory for [`Head::by_value`].
    fn by_value_len(&self, order: Order) -> usize {
        let dim = self.geometry.layout.head_dim;
        Right::len(order, Matrix::<f32>::rows(&[], dim), self.keys(), dim)
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
        let head = Head::new(geometry, task, prefix);
        let all = head.keys();
        let order = Order::for_rows(QUERY_TILE.min(head.span.q_len));
        let lens = [
            all * dim,
            head.by_key_len(order),
            all * dim,
            head.by_value_len(order),
            QUERY_TILE * dim,
            QUERY_TILE * all,
            QUERY_TILE * dim,
        ];
        with_scratch(parts_len(&lens), |scratch| {
            let [
                keys,
                keys_in_order,
                values,
                values_in_order,
                q,
                scores,
                context,
            ] = parts(scratch, lens);
            head.gather_keys(keys, key_value);
            let keys_t = head.by_key(order, keys, keys_in_order);
            head.gather_values(values, key_value);
            let values = head.by_value(order, values, values_in_order);
            for q_head in head.kv_head * group..(head.kv_head + 1) * group {
                for (first, rows, keys) in head.tiles() {
                    let row = head.span.q_start + first;
                    gather(&mut q[..rows * dim], query, layout.query, q_head, row, dim);
                    let extent = Extent {
                        m: rows,
                        n: keys,
                        k: dim,
                    };
                    let q = Matrix::rows(q, dim);
                    multiply(scores, keys, extent, q, &keys_t, geometry.scale, false);
                    for (i, scores) in scores.chunks_exact_mut(keys).take(rows).enumerate() {
                        let log_sum = softmax(scores, head.visible(first + i));
                        // SAFETY: one place per query and head, and this task alone has this head.
                        unsafe { lse.at((row + i) * layout.heads + q_head, 1) }.fill(log_sum);
                    }
                    let extent = Extent {
                        m: rows,
                        n: dim,
                        k: keys,
                    };
                    let probabilities = Matrix::rows(scores, keys);
                    multiply(context, dim, extent, probabilities, &values, 1.0, false);
                    for (i, context) in context.chunks_exact(dim).take(rows).enumerate() {
                        // SAFETY: as above, `dim` places per query and head.
                        let out = unsafe { out.at(((row + i) * layout.heads + q_head) * dim, dim) };
                        round(out, context);
                    }
                }
            }
        });
    });
}

/// Softmax of the first `seen` scores, zeros for the others; the log of the sum of exponentials.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn softmax(scores: &mut [f32], seen: usize) -> f32 {
    let (seen, hidden) = scores.split_at_mut(seen);
    let max = reduce::max(seen);
    for score in seen.iter_mut() {
        *score = reduce::exp(*score - max);
    }
    let sum = reduce::sum(seen);
    for score in seen {
        *score /= sum;
    }
    hidden.fill(0.0);
    max + sum.ln()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn round<E: Element>(out: &mut [E], values: &[f32]) {
    for (out, &value) in out.iter_mut().zip(values) {
        *out = E::from_f32(value);
    }
}

/// Scores become probabilities and `ds`, which holds `do vᵀ`, the gradient of the scores; zeros beyond
/// the first `seen`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn softmax_backward(
    p: &mut [f32],
    ds: &mut [f32],
    seen: usize,
    lse: f32,
    dout: &[f32],
    out: &[f32],
) {
    let delta = reduce::dot(dout, out);
    let (p, p_hidden) = p.split_at_mut(seen);
    let (ds, ds_hidden) = ds.split_at_mut(seen);
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = reduce::exp(*p - lse);
        *ds = *p * (*ds - delta);
    }
    p_hidden.fill(0.0);
    ds_hidden.fill(0.0);
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
        let head = Head::new(geometry, task, prefix);
        let all = head.keys();
        let order = Order::for_rows(QUERY_TILE.min(head.span.q_len));
        let (kv_len, tile_len, scores_len) = (all * dim, QUERY_TILE * dim, QUERY_TILE * all);
        let by_key_len = head.by_key_len(order);
        let by_dim_len = Right::len(order, Matrix::<f32>::rows(&[], dim), QUERY_TILE, dim);
        let lens = [
            kv_len,
            by_key_len,
            head.by_value_len(order),
            kv_len,
            by_key_len,
            kv_len,
            kv_len,
            tile_len,
            by_dim_len,
            tile_len,
            by_dim_len,
            tile_len,
            tile_len,
            scores_len,
            scores_len,
        ];
        with_scratch(parts_len(&lens), |scratch| {
            let [
                keys_of_head,
                keys_by_key,
                keys_by_value,
                values_of_head,
                values_by_key,
                dkeys,
                dvalues,
                q,
                q_in_order,
                dout,
                dout_in_order,
                out,
                dq,
                p,
                ds,
            ] = parts(scratch, lens);
            head.gather_keys(keys_of_head, saved.qkv);
            let keys_t = head.by_key(order, keys_of_head, keys_by_key);
            let key_rows = head.by_value(order, keys_of_head, keys_by_value);
            head.gather_values(values_of_head, saved.qkv);
            let values_t = head.by_key(order, values_of_head, values_by_key);
            dkeys.fill(0.0);
            dvalues.fill(0.0);
            let write = |place: HeadLayout, head: usize, row: usize, values: &[f32]| {
                let start = row * place.row + place.offset + head * place.stride;
                // SAFETY: query heads of this group and this key/value head belong to this task alone.
                round(unsafe { dqkv.at(start, dim) }, values);
            };
            for q_head in head.kv_head * group..(head.kv_head + 1) * group {
                for (first, rows, keys) in head.tiles() {
                    let row = head.span.q_start + first;
                    let gather = |out: &mut [f32], x: &[E], place: HeadLayout| {
                        gather(&mut out[..rows * dim], x, place, q_head, row, dim);
                    };
                    gather(q, saved.qkv, layout.query);
                    gather(dout, saved.dout, contiguous);
                    gather(out, saved.out, contiguous);
                    let extent = Extent {
                        m: rows,
                        n: keys,
                        k: dim,
                    };
                    let scale = geometry.scale;
                    let (q_rows, dout_rows) = (Matrix::rows(q, dim), Matrix::rows(dout, dim));
                    multiply(p, keys, extent, q_rows, &keys_t, scale, false);
                    multiply(ds, keys, extent, dout_rows, &values_t, 1.0, false);
                    for i in 0..rows {
                        let lse = saved.lse[(row + i) * layout.heads + q_head];
                        let (scores, values) = (i * keys..(i + 1) * keys, i * dim..(i + 1) * dim);
                        let (p, ds) = (&mut p[scores.clone()], &mut ds[scores]);
                        let seen = head.visible(first + i);
                        softmax_backward(p, ds, seen, lse, &dout[values.clone()], &out[values]);
                    }
                    let extent = Extent {
                        m: rows,
                        n: dim,
                        k: keys,
                    };
                    multiply(
                        dq,
                        dim,
                        extent,
                        Matrix::rows(ds, keys),
                        &key_rows,
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
                    let (dst, pt) = (Matrix::transposed(ds, keys), Matrix::transposed(p, keys));
                    let q = Right::new(order, Matrix::rows(q, dim), rows, dim, q_in_order);
                    let dout = Right::new(order, Matrix::rows(dout, dim), rows, dim, dout_in_order);
                    multiply(dkeys, dim, extent, dst, &q, scale, true);
                    multiply(dvalues, dim, extent, pt, &dout, 1.0, true);
                }
            }
            let own = head.prefix_len * dim;
            for (place, gradient) in [(layout.key, &*dkeys), (layout.value, &*dvalues)] {
                for (row, values) in gradient[own..].chunks_exact(dim).enumerate() {
                    write(place, head.kv_head, head.span.kv_start + row, values);
                }
            }
            if let Some(dprefix) = &dprefix {
                let width = layout.key_value_width();
                let first = task / layout.kv_heads * head.prefix_len;
                for (offset, gradient) in [(0, &*dkeys), (width / 2, &*dvalues)] {
                    for (row, values) in gradient[..own].chunks_exact(dim).enumerate() {
                        let start = (first + row) * width + offset + head.kv_head * dim;
                        // SAFETY: one place per sequence, prefix row and key/value head.
                        unsafe { dprefix.at(start, dim) }.copy_from_slice(values);
                    }
                }
            }
        });
    });
}
