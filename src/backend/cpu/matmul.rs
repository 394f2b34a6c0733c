//! Matrix products.
//!
//! The output is cut into tiles; each is computed on one thread. Where the processor has AVX-512 an element
//! is the same sum in whatever tile ([`strips`](super::strips)), so that the number of threads may decide
//! how many there are; else, and for few rows, kernels are those of the `gemm` crate, and tiles are cut by
//! shape alone, so that a result does not depend on the number of threads either. f32 outputs are written
//! in place. f16 operands are widened on their way into the kernels and summed in f32 with one rounding
//! at the end (the crate's own f16 path rounds partial sums).

use std::ops::Range;

use multiversion::multiversion;

use super::elementwise::{gelu_backward_piece, gelu_piece};
use super::operands::{Extent, Matrix, Order, Right};
use super::strips::{self, Start};
use super::threads::{Scattered, Threads, with_scratch};
use crate::backend::{Element, LinearShape, Work};

/// Output tiles to choose from, rows and columns, large to small. Tall ones, since the right operand, a
/// weight, is brought into the kernels' order for every tile of rows anew; but every thread should get some.
const TILES: [(usize, usize); 5] = [(1024, 128), (1024, 64), (512, 64), (256, 64), (128, 64)];
/// Tiles that are enough to keep threads busy, where their number is not known.
const ENOUGH_TILES: usize = 16;
/// The same for each thread, where it is.
const ENOUGH_TILES_PER_THREAD: usize = 8;
/// Length of sums for which operands are copied at once: panels of it stay in the second-level cache.
const DEPTH: usize = 1024;
/// Rows for which that is done, and of the output that are finished at once, while the second-level cache has
/// them.
const BLOCK_ROWS: usize = 120;

fn tile_size(m: usize, n: usize, order: Order, threads: usize) -> (usize, usize) {
    let wanted = match order {
        Order::Panels => ENOUGH_TILES_PER_THREAD * threads,
        Order::Rows | Order::Stored => ENOUGH_TILES,
    };
    let enough = |&(rows, cols): &(usize, usize)| m.div_ceil(rows) * n.div_ceil(cols) >= wanted;
    TILES.into_iter().find(enough).unwrap_or((128, 64))
}

/// `out = scale * x weightᵀ + bias`, added to `out` when `accumulate`.
#[allow(clippy::too_many_arguments)]
pub fn linear<E: Element>(
    threads: &Threads,
    out: &mut [E],
    x: &[E],
    weight: &[E],
    bias: Option<&[E]>,
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) {
    let _counting = threads.clock.count(Work::Products);
    let extent = Extent {
        m: shape.rows,
        n: shape.out_features,
        k: shape.in_features,
    };
    let x = Matrix::rows(x, shape.in_features);
    let weight = Matrix::transposed(weight, shape.in_features);
    let done = |_: usize, _: usize, _: &mut [E]| {};
    product(
        threads, out, extent, x, weight, bias, scale, accumulate, done,
    );
}

/// `pre = x weightᵀ + bias`, `out = gelu(pre)`.
pub fn linear_gelu<E: Element>(
    threads: &Threads,
    out: &mut [E],
    pre: &mut [E],
    x: &[E],
    weight: &[E],
    bias: Option<&[E]>,
    shape: LinearShape,
) {
    let _counting = threads.clock.count(Work::Products);
    let extent = Extent {
        m: shape.rows,
        n: shape.out_features,
        k: shape.in_features,
    };
    let x = Matrix::rows(x, shape.in_features);
    let weight = Matrix::transposed(weight, shape.in_features);
    let out = Scattered::new(out);
    let gelu = |row: usize, col: usize, pre: &mut [E]| {
        // SAFETY: the same place as the piece's in `pre`, which has one owner.
        let out = unsafe { out.at(row * shape.out_features + col, pre.len()) };
        gelu_piece(out, pre);
    };
    product(threads, pre, extent, x, weight, bias, 1.0, false, gelu);
}

/// `dpre = (dout weight) * gelu'(pre)`.
pub fn gelu_linear_backward<E: Element>(
    threads: &Threads,
    dpre: &mut [E],
    dout: &[E],
    weight: &[E],
    pre: &[E],
    shape: LinearShape,
) {
    let _counting = threads.clock.count(Work::Products);
    let extent = Extent {
        m: shape.rows,
        n: shape.in_features,
        k: shape.out_features,
    };
    let dout = Matrix::rows(dout, shape.out_features);
    let weight = Matrix::rows(weight, shape.in_features);
    let slope = |row: usize, col: usize, dpre: &mut [E]| {
        gelu_backward_piece(dpre, &pre[row * shape.in_features + col..]);
    };
    product(threads, dpre, extent, dout, weight, None, 1.0, false, slope);
}

/// `dx = scale * dout weight`, added to `dx` when `accumulate`.
pub fn linear_backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: &[E],
    weight: &[E],
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) {
    let _counting = threads.clock.count(Work::Products);
    let extent = Extent {
        m: shape.rows,
        n: shape.in_features,
        k: shape.out_features,
    };
    let dout = Matrix::rows(dout, shape.out_features);
    let weight = Matrix::rows(weight, shape.in_features);
    let done = |_: usize, _: usize, _: &mut [E]| {};
    product(
        threads, dx, extent, dout, weight, None, scale, accumulate, done,
    );
}

/// `dweight += scale * doutᵀ x`.
pub fn weight_gradient<E: Element>(
    threads: &Threads,
    dweight: &mut [f32],
    dout: &[E],
    x: &[E],
    shape: LinearShape,
    scale: f32,
) {
    let _counting = threads.clock.count(Work::Products);
    let extent = Extent {
        m: shape.out_features,
        n: shape.in_features,
        k: shape.rows,
    };
    let dout = Matrix::transposed(dout, shape.out_features);
    let x = Matrix::rows(x, shape.in_features);
    let done = |_: usize, _: usize, _: &mut [f32]| {};
    product(threads, dweight, extent, dout, x, None, scale, true, done);
}

/// `out = scale * a b + (out if accumulate)`, single-threaded. `out` has contiguous rows `out_stride` apart.
pub fn multiply(
    out: &mut [f32],
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: &Right<'_>,
    scale: f32,
    accumulate: bool,
) {
    let Extent { m, n, .. } = extent;
    assert!(
        m == 0 || n == 0 || (m - 1) * out_stride + n <= out.len(),
        "product outside of its output"
    );
    let start = match accumulate {
        true => Start::kept(),
        false => Start::default(),
    };
    // SAFETY: the assertion bounds what is written, and `out` is borrowed uniquely.
    unsafe { multiply_at(out.as_mut_ptr(), out_stride, extent, a, b, scale, start) }
}

/// The same at a place in a larger output, with a bias for its columns.
///
/// # Safety
/// The `n` values from `out` on, and those `out_stride` further for each of `m` rows, must be valid for
/// reading and writing, and nobody else's.
unsafe fn multiply_at(
    out: *mut f32,
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: &Right<'_>,
    scale: f32,
    start: Start<'_>,
) {
    match b {
        // SAFETY: as promised by the caller; panels are only made where there is AVX-512.
        Right::Panels(b) => unsafe {
            strips::multiply(out, out_stride, extent, a, b, scale, start);
        },
        // SAFETY: as promised by the caller.
        Right::Matrix(b) => unsafe {
            multiply_by_library(out, out_stride, extent, a, *b, scale, start);
        },
    }
}

/// The same with the kernels of `gemm`.
///
/// # Safety
/// As [`multiply_at`].
unsafe fn multiply_by_library(
    out: *mut f32,
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: Matrix<'_, f32>,
    scale: f32,
    start: Start<'_>,
) {
    let Extent { m, n, k } = extent;
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.holds(m, k), "product reads outside of its left operand");
    assert!(b.holds(k, n), "product reads outside of its right operand");
    if let Some(bias) = start.bias {
        for row in 0..m {
            // SAFETY: n values of a row of the output, by the caller's promise.
            let out = unsafe { std::slice::from_raw_parts_mut(out.add(row * out_stride), n) };
            set_bias(out, &bias[..n], start.keep);
        }
    }
    // SAFETY: the assertions above bound every element that m, n, k and the strides can reach in the
    // operands, and the caller vouches for `out`, which overlaps neither operand as these are borrowed.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride as isize,
            start.keep || start.bias.is_some(),
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A part of the output, its place in the operands, and its shape.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    col: usize,
    extent: Extent,
}

/// `out [m, n] = scale * a b + bias + (out if accumulate)`, rounded once to `O`. Pieces of rows are handed to
/// `finish` by row and first column as soon as they are final, when they still are in the cache.
#[allow(clippy::too_many_arguments)]
fn product<T: Element, O: Element>(
    threads: &Threads,
    out: &mut [O],
    extent: Extent,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    bias: Option<&[T]>,
    scale: f32,
    accumulate: bool,
    finish: impl Fn(usize, usize, &mut [O]) + Sync,
) {
    let Extent { m, n, k } = extent;
    let out = &mut out[..m * n];
    let order = Order::for_rows(m);
    let (tile_rows, tile_cols) = tile_size(m, n, order, threads.count());
    let tile_columns = n.div_ceil(tile_cols);
    let tiles = m.div_ceil(tile_rows) * tile_columns;
    let tile = |index: usize| {
        let (row, col) = (
            index / tile_columns * tile_rows,
            index % tile_columns * tile_cols,
        );
        let (m, n) = (tile_rows.min(m - row), tile_cols.min(n - col));
        let extent = Extent { m, n, k };
        Tile { row, col, extent }
    };
    let in_place = O::as_f32_mut(out).is_some();
    let out = Scattered::new(out);
    threads.tasks(tiles, |index| {
        let tile = tile(index);
        let Tile { row, col, extent } = tile;
        // SAFETY: tiles do not overlap, and this is a row of this tile, of which no other piece is alive.
        let piece = |row: usize| unsafe { out.at(row * n + col, extent.n) };
        if in_place {
            let first = out.start_of(row * n + col, (extent.m - 1) * n + extent.n);
            let start = Start {
                keep: accumulate,
                bias: bias.and_then(T::as_f32),
            };
            let finish = |rows: Range<usize>| {
                for row in rows {
                    finish(row, col, piece(row));
                }
            };
            with_scratch(copies_len(order, a, b, extent), |copies| {
                let first = first.cast();
                // SAFETY: the places of this tile, which `start_of` found to be in `out`, and which hold f32.
                unsafe { compute_tile(first, n, tile, order, a, b, scale, start, copies, finish) };
            });
            return;
        }
        let sums_len = extent.m * extent.n;
        with_scratch(sums_len + copies_len(order, a, b, extent), |scratch| {
            let (sums, copies) = scratch.split_at_mut(sums_len);
            let (first, start) = (sums.as_mut_ptr(), Start::default());
            let finish = |rows: Range<usize>| {
                for row in rows {
                    let place = (row - tile.row) * extent.n;
                    // SAFETY: a row of `sums`, which nobody writes while rows are finished.
                    let sums = unsafe { std::slice::from_raw_parts(first.add(place), extent.n) };
                    let out = piece(row);
                    match bias {
                        Some(bias) => store_with_bias(out, sums, &bias[col..], accumulate),
                        None => store(out, sums, accumulate),
                    }
                    finish(row, col, out);
                }
            };
            let width = extent.n;
            // SAFETY: `sums` is as large as the tile.
            unsafe {
                compute_tile(
                    first, width, tile, order, a, b, scale, start, copies, finish,
                )
            };
        });
    });
}

/// Rows of a tile that are computed at once.
fn rows_at_once(order: Order, rows: usize) -> usize {
    match order {
        Order::Panels => rows.min(BLOCK_ROWS),
        Order::Rows | Order::Stored => rows,
    }
}

/// Values of scratch memory that [`compute_tile`] needs for copies of its operands.
fn copies_len<T: Element>(order: Order, a: Matrix<'_, T>, b: Matrix<'_, T>, tile: Extent) -> usize {
    let depth = DEPTH.min(tile.k);
    let rows = rows_at_once(order, tile.m);
    a.left_len(order, rows, depth) + Right::len(order, b, depth, tile.n)
}

/// `out = scale * a b + start` for one tile, `copies` of [`copies_len`]. `finish` is told which rows
/// of the output, counted from its first, are final.
///
/// # Safety
/// As [`multiply_at`].
#[allow(clippy::too_many_arguments)]
unsafe fn compute_tile<T: Element>(
    out: *mut f32,
    out_stride: usize,
    tile: Tile,
    order: Order,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    scale: f32,
    start: Start<'_>,
    copies: &mut [f32],
    finish: impl Fn(Range<usize>),
) {
    let Extent { m, n, k } = tile.extent;
    // Without copies the library cuts the sums by itself.
    let depth = if copies.is_empty() { k } else { DEPTH.min(k) };
    let bias = start.bias.map(|bias| &bias[tile.col..][..n]);
    for first in (0..k).step_by(depth.max(1)) {
        let k = depth.min(k - first);
        let start = match first {
            0 => Start { bias, ..start },
            _ => Start::kept(),
        };
        let b = b.part(first, tile.col);
        let (right, left) = copies.split_at_mut(Right::len(order, b, k, n));
        let b = Right::new(order, b, k, n, right);
        let rows = rows_at_once(order, m).max(1);
        let last = first + k == tile.extent.k;
        for row in (0..m).step_by(rows) {
            let m = rows.min(m - row);
            let a = a.part(tile.row + row, first);
            let left = &mut left[..a.left_len(order, m, k)];
            let (a, extent) = (a.left(order, m, k, left), Extent { m, n, k });
            // SAFETY: as promised by the caller, for these rows of the tile.
            unsafe {
                let out = out.add(row * out_stride);
                multiply_at(out, out_stride, extent, a, &b, scale, start);
            }
            if last {
                finish(tile.row + row..tile.row + row + m);
            }
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn set_bias<T: Element>(out: &mut [f32], bias: &[T], accumulate: bool) {
    for (out, bias) in out.iter_mut().zip(bias) {
        *out = bias.to_f32() + if accumulate { *out } else { 0.0 };
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn store<O: Element>(out: &mut [O], sums: &[f32], accumulate: bool) {
    for (out, &sum) in out.iter_mut().zip(sums) {
        let before = if accumulate { out.to_f32() } else { 0.0 };
        *out = O::from_f32(before + sum);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn store_with_bias<T: Element, O: Element>(
    out: &mut [O],
    sums: &[f32],
    bias: &[T],
    accumulate: bool,
) {
    for ((out, &sum), bias) in out.iter_mut().zip(sums).zip(bias) {
        let before = if accumulate { out.to_f32() } else { 0.0 };
        *out = O::from_f32(before + sum + bias.to_f32());
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::backend::Sums;
    use crate::backend::cpu::elementwise;

    /// Small numbers, in both halves of the sign.
    fn values<T: Element>(len: usize, seed: usize) -> Vec<T> {
        let value = |i: usize| ((i * 2_654_435 + seed * 40_503) % 1_999) as f32 / 1_000.0 - 1.0;
        (0..len).map(|i| T::from_f32(value(i))).collect()
    }

    /// `[m, k]` and `[k, n]`, each stored by rows or by columns, with something behind each row.
    fn matrices<T: Element>(
        extent: Extent,
        by_rows: (bool, bool),
        memory: &mut (Vec<T>, Vec<T>),
    ) -> (Matrix<'_, T>, Matrix<'_, T>) {
        let Extent { m, n, k } = extent;
        *memory = (values((m + 3) * (k + 3), 1), values((k + 3) * (n + 3), 2));
        let stored = |values, rows: usize, cols: usize, by_rows: bool| match by_rows {
            true => Matrix::rows(values, cols + 3),
            false => Matrix::transposed(values, rows + 3),
        };
        (
            stored(&memory.0[..], m, k, by_rows.0),
            stored(&memory.1[..], k, n, by_rows.1),
        )
    }

    /// Every order of operands gives the products, and nothing beside the tile is written.
    fn tile_is_computed<T: Element>(order: Order) {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 65, 97),
            (12, 32, 16),
            (13, 33, 1025),
            (65, 97, 3),
            (97, 16, 65),
            (131, 34, 70),
        ] {
            for by_rows in [(true, true), (true, false), (false, true), (false, false)] {
                for (keep, biased) in [(false, false), (false, true), (true, false), (true, true)] {
                    let extent = Extent { m, n, k };
                    let mut memory = (Vec::new(), Vec::new());
                    let (a, b) = matrices::<T>(extent, by_rows, &mut memory);
                    let bias = values::<f32>(n, 3);
                    let before = values::<f32>(m * (n + 2), 4);
                    let mut out = before.clone();
                    let start = Start {
                        keep,
                        bias: biased.then_some(&bias[..]),
                    };
                    let tile = Tile {
                        row: 0,
                        col: 0,
                        extent,
                    };
                    let mut copies = vec![f32::NAN; copies_len(order, a, b, extent)];
                    // SAFETY: `out` has m rows of n + 2 values.
                    unsafe {
                        let (out, copies) = (out.as_mut_ptr(), &mut copies[..]);
                        compute_tile(out, n + 2, tile, order, a, b, 0.5, start, copies, |_| {});
                    }
                    for row in 0..m {
                        for col in 0..n + 2 {
                            let (place, what) = (row * (n + 2) + col, (m, n, k, by_rows, row, col));
                            if col >= n {
                                assert_eq!(out[place], before[place], "{what:?}: beside the tile");
                                continue;
                            }
                            let sum: f64 = (0..k)
                                .map(|i| {
                                    let a = a.values[row * a.row_stride + i * a.col_stride];
                                    let b = b.values[i * b.row_stride + col * b.col_stride];
                                    f64::from(a.to_f32()) * f64::from(b.to_f32())
                                })
                                .sum();
                            let kept = if keep { before[place] } else { 0.0 };
                            let bias = if biased { bias[col] } else { 0.0 };
                            let expected = 0.5 * sum + f64::from(kept) + f64::from(bias);
                            let error = (f64::from(out[place]) - expected).abs();
                            assert!(error <= 1e-6 * (k as f64 + 4.0), "{what:?}: off by {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_are_computed_in_every_order() {
        for order in [Order::Rows, Order::Stored] {
            tile_is_computed::<f32>(order);
            tile_is_computed::<f16>(order);
        }
        if strips::supported() {
            tile_is_computed::<f32>(Order::Panels);
            tile_is_computed::<f16>(Order::Panels);
        }
    }

    /// Rows computed alone, and beside others, with more and with fewer threads.
    #[test]
    fn panels_give_the_same_bits_in_every_tile() {
        if !strips::supported() {
            return;
        }
        let (m, n, k) = (1_100, 193, 1_030);
        let (x, weight) = (values::<f32>(m * k, 1), values::<f32>(n * k, 2));
        let compute = |threads: usize, rows: usize| {
            let threads = Threads::new(threads).expect("threads");
            let mut out = vec![0.0; rows * n];
            let extent = Extent { m: rows, n, k };
            let (a, b) = (Matrix::rows(&x[..], k), Matrix::transposed(&weight[..], k));
            product(
                &threads,
                &mut out,
                extent,
                a,
                b,
                None,
                1.0,
                false,
                |_, _, _| {},
            );
            out
        };
        let all = compute(1, m);
        assert_eq!(all, compute(3, m));
        for rows in [16, 65, 512] {
            assert_eq!(all[..rows * n], compute(2, rows), "{rows} rows");
        }
    }

    /// The bits of one op after the other.
    fn gelu_is_that_of_its_own_op<T: Element + PartialEq + std::fmt::Debug>() {
        for (rows, inner, hidden) in [(1, 3, 65), (65, 97, 3), (131, 200, 33), (17, 130, 1_030)] {
            let threads = Threads::new(2).expect("threads");
            let shape = |in_features, out_features| LinearShape {
                rows,
                in_features,
                out_features,
                sums: Sums::F32,
            };
            let (x, weight) = (
                values::<T>(rows * hidden, 1),
                values::<T>(inner * hidden, 2),
            );
            let (bias, blank) = (values::<T>(inner, 3), values::<T>(rows * inner, 4));
            let into = shape(hidden, inner);
            let (mut out, mut pre) = (blank.clone(), blank.clone());
            linear_gelu(&threads, &mut out, &mut pre, &x, &weight, Some(&bias), into);
            let (mut expected, mut before) = (blank.clone(), blank.clone());
            let biased = Some(&bias[..]);
            linear(&threads, &mut before, &x, &weight, biased, into, 1.0, false);
            elementwise::gelu(&threads, &mut expected, &before);
            assert_eq!(pre, before, "{rows} x {hidden} to {inner}");
            assert_eq!(out, expected, "{rows} x {hidden} to {inner}");

            let back = shape(inner, hidden);
            let (mut dpre, mut expected) = (blank.clone(), blank);
            gelu_linear_backward(&threads, &mut dpre, &x, &weight, &pre, back);
            linear_backward(&threads, &mut expected, &x, &weight, back, 1.0, false);
            elementwise::gelu_backward(&threads, &mut expected, &pre);
            assert_eq!(dpre, expected, "{rows} x {inner} from {hidden}");
        }
    }

    #[test]
    fn gelu_in_a_product_is_that_of_its_own_op() {
        gelu_is_that_of_its_own_op::<f32>();
        gelu_is_that_of_its_own_op::<f16>();
    }
}
