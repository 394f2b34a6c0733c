//! Matrix products, on the `gemm` crate's f32 kernels.
//!
//! The output is cut into tiles by shape; each tile is computed on one thread, so that a result does not
//! depend on the number of threads. f32 outputs are written in place. f16 operands are widened panel by
//! panel and summed in f32 with one rounding at the end (the crate's own f16 path rounds partial sums).

use multiversion::multiversion;

use super::threads::{Scattered, Threads, with_scratch};
use super::transpose::transpose;
use crate::backend::{Element, LinearShape, Work};

/// Output tiles to choose from, rows and columns, large to small. Tall ones, since the right operand, a
/// weight, is brought into the kernels' order for every tile of rows anew; all run at the speed of one
/// large product on an AMD EPYC (Zen 5), but every thread should get some.
const TILES: [(usize, usize); 5] = [(1024, 256), (1024, 128), (512, 128), (256, 128), (128, 128)];
/// Tiles that are enough to keep threads busy.
const ENOUGH_TILES: usize = 16;
/// Length of sums for which operands are copied at once: panels of it stay in the second-level cache.
const PANEL_DEPTH: usize = 512;
/// Rows of a tile from which on the right operand is transposed here: the library's own packing of
/// columns takes a tenth of a product of 512 rows.
const ROWS_WORTH_TRANSPOSING: usize = 64;

fn tile_size(m: usize, n: usize) -> (usize, usize) {
    let enough =
        |&(rows, cols): &(usize, usize)| m.div_ceil(rows) * n.div_ceil(cols) >= ENOUGH_TILES;
    TILES.into_iter().find(enough).unwrap_or((128, 128))
}

/// A matrix inside a slice, by its strides.
#[derive(Clone, Copy)]
pub struct Matrix<'a, T> {
    /// The values.
    pub values: &'a [T],
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Contiguous rows of `cols` values.
    pub fn rows(values: &'a [T], cols: usize) -> Self {
        Matrix {
            values,
            row_stride: cols,
            col_stride: 1,
        }
    }

    /// The transpose of contiguous rows of `cols` values.
    pub fn transposed(values: &'a [T], cols: usize) -> Self {
        Matrix {
            values,
            row_stride: 1,
            col_stride: cols,
        }
    }

    /// The same from another first row and column on.
    fn part(self, row: usize, col: usize) -> Self {
        Matrix {
            values: &self.values[row * self.row_stride + col * self.col_stride..],
            ..self
        }
    }

    fn last(&self, rows: usize, cols: usize) -> usize {
        (rows - 1) * self.row_stride + (cols - 1) * self.col_stride
    }
}

/// m, n, k of `[m, k] [k, n] -> [m, n]`.
#[derive(Clone, Copy)]
pub struct Extent {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
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
    product(threads, out, extent, x, weight, bias, scale, accumulate);
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
    product(threads, dx, extent, dout, weight, None, scale, accumulate);
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
    product(threads, dweight, extent, dout, x, None, scale, true);
}

/// `out = scale * a b + (out if accumulate)` on f32 views, single-threaded.
/// `out` has contiguous rows `out_stride` apart.
pub fn multiply(
    out: &mut [f32],
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: Matrix<'_, f32>,
    scale: f32,
    accumulate: bool,
) {
    let Extent { m, n, .. } = extent;
    assert!(
        m == 0 || n == 0 || (m - 1) * out_stride + n <= out.len(),
        "product outside of its output"
    );
    // SAFETY: the assertion bounds what is written, and `out` is borrowed uniquely.
    unsafe {
        multiply_at(
            out.as_mut_ptr(),
            out_stride,
            extent,
            a,
            b,
            scale,
            accumulate,
        )
    }
}

/// The same at a place in a larger output.
///
/// # Safety
/// The `n` values from `out` on, and those `out_stride` further for each of `m` rows, must be valid for
/// reading and writing, and nobody else's.
unsafe fn multiply_at(
    out: *mut f32,
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: Matrix<'_, f32>,
    scale: f32,
    accumulate: bool,
) {
    let Extent { m, n, k } = extent;
    if m == 0 || n == 0 {
        return;
    }
    if k > 0 {
        assert!(
            a.last(m, k) < a.values.len(),
            "product reads outside of its left operand"
        );
        assert!(
            b.last(k, n) < b.values.len(),
            "product reads outside of its right operand"
        );
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
            accumulate,
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

/// `out [m, n] = scale * a b + bias + (out if accumulate)`, rounded once to `O`.
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
) {
    let Extent { m, n, k } = extent;
    let out = &mut out[..m * n];
    let (tile_rows, tile_cols) = tile_size(m, n);
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
    if let Some(out) = O::as_f32_mut(out) {
        let out = Scattered::new(out);
        threads.tasks(tiles, |index| {
            let Tile { row, col, extent } = tile(index);
            if let Some(bias) = bias {
                for row in row..row + extent.m {
                    // SAFETY: tiles do not overlap, and this is a row of this tile.
                    let out = unsafe { out.at(row * n + col, extent.n) };
                    set_bias(out, &bias[col..], accumulate);
                }
            }
            let start = out.start_of(row * n + col, (extent.m - 1) * n + extent.n);
            let accumulate = accumulate || bias.is_some();
            with_scratch(panels_len(b, extent), |panels| {
                // SAFETY: the places of this tile, which `start_of` found to be in `out`.
                unsafe { add_tile(start, n, tile(index), a, b, scale, accumulate, panels) };
            });
        });
        return;
    }
    let out = Scattered::new(out);
    threads.tasks(tiles, |index| {
        let Tile { row, col, extent } = tile(index);
        let sums_len = extent.m * extent.n;
        with_scratch(sums_len + panels_len(b, extent), |scratch| {
            let (sums, panels) = scratch.split_at_mut(sums_len);
            let start = sums.as_mut_ptr();
            // SAFETY: `sums` is as large as the tile.
            unsafe { add_tile(start, extent.n, tile(index), a, b, scale, false, panels) };
            for (row, sums) in (row..).zip(sums.chunks_exact(extent.n)) {
                // SAFETY: tiles do not overlap, and this is a row of this tile.
                let out = unsafe { out.at(row * n + col, extent.n) };
                match bias {
                    Some(bias) => store_with_bias(out, sums, &bias[col..], accumulate),
                    None => store(out, sums, accumulate),
                }
            }
        });
    });
}

/// Whether the right operand of a tile is brought into rows of its columns.
fn transposes<T>(b: Matrix<'_, T>, tile: Extent) -> bool {
    b.col_stride != 1 && tile.m >= ROWS_WORTH_TRANSPOSING
}

/// Values of scratch memory that [`add_tile`] needs for copies of its operands.
fn panels_len<T: Element>(b: Matrix<'_, T>, tile: Extent) -> usize {
    let depth = PANEL_DEPTH.min(tile.k);
    let stored_as_f32 = T::as_f32(b.values).is_some();
    let copies_a = !stored_as_f32;
    let copies_b = !stored_as_f32 || transposes(b, tile);
    depth * (if copies_a { tile.m } else { 0 } + if copies_b { tile.n } else { 0 })
}

/// `out = scale * a b + (out if accumulate)` for one tile, `panels` of [`panels_len`].
///
/// # Safety
/// As [`multiply_at`].
#[allow(clippy::too_many_arguments)]
unsafe fn add_tile<T: Element>(
    out: *mut f32,
    out_stride: usize,
    tile: Tile,
    a: Matrix<'_, T>,
    b: Matrix<'_, T>,
    scale: f32,
    accumulate: bool,
    panels: &mut [f32],
) {
    let Extent { m, n, k } = tile.extent;
    let transposes = transposes(b, tile.extent);
    // Without copies the library cuts the sums by itself.
    let depth = if panels.is_empty() {
        k
    } else {
        PANEL_DEPTH.min(k)
    };
    for first in (0..k).step_by(depth.max(1)) {
        let k = depth.min(k - first);
        let extent = Extent { m, n, k };
        let (a, panels) = f32_panel(a.part(tile.row, first), m, k, &mut *panels);
        let b = b.part(first, tile.col);
        let b = if transposes {
            let panel = &mut panels[..k * n];
            transpose(panel, b.values, b.col_stride, n);
            Matrix::rows(panel, n)
        } else {
            f32_panel(b, k, n, panels).0
        };
        // SAFETY: as promised by the caller.
        unsafe {
            multiply_at(
                out,
                out_stride,
                extent,
                a,
                b,
                scale,
                accumulate || first > 0,
            )
        };
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

/// Rows and columns from the start of a matrix, as f32: a view where it is f32 already, else a copy at
/// the start of `panels`. What is left of `panels` comes along.
fn f32_panel<'a, T: Element>(
    matrix: Matrix<'a, T>,
    rows: usize,
    cols: usize,
    panels: &'a mut [f32],
) -> (Matrix<'a, f32>, &'a mut [f32]) {
    let Matrix {
        values,
        row_stride,
        col_stride,
    } = matrix;
    if let Some(values) = T::as_f32(values) {
        let view = Matrix {
            values,
            row_stride,
            col_stride,
        };
        return (view, panels);
    }
    let (panel, rest) = panels.split_at_mut(rows * cols);
    let (stride, width) = if col_stride == 1 {
        (row_stride, cols)
    } else {
        (col_stride, rows)
    };
    for (index, out) in panel.chunks_exact_mut(width).enumerate() {
        T::widen(out, &values[index * stride..][..width]);
    }
    let panel = if col_stride == 1 {
        Matrix::rows(panel, cols)
    } else {
        Matrix::transposed(panel, rows)
    };
    (panel, rest)
}
