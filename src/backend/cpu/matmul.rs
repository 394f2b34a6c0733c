//! Matrix products, on the `gemm` crate's f32 kernels.
//!
//! The output is cut into tiles by shape; each tile is one single-threaded call, so that a result
//! does not depend on the number of threads. f16 operands are widened panel by panel and summed in
//! f32 with one rounding at the end (the crate's own f16 path rounds partial sums).

use super::threads::{Scattered, Threads};
use crate::backend::{Element, LinearShape, Work};

/// Output tiles to choose from, rows and columns, large to small: the library packs its operands anew
/// for every tile, so large ones are faster (512 rows instead of 128: 90 to 162 GFLOP/s on one thread
/// of an AMD EPYC at 512 x 1024 x 4096, f32), but every thread should get some.
const TILES: [(usize, usize); 4] = [(512, 512), (256, 512), (128, 512), (128, 128)];
/// Tiles that are enough to keep threads busy.
const ENOUGH_TILES: usize = 8;

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
    let Extent { m, n, k } = extent;
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        (m - 1) * out_stride + n <= out.len(),
        "product outside of its output"
    );
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
    // SAFETY: the assertions above bound every element that m, n, k and the strides can reach, and
    // `out` is borrowed uniquely, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
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
    let out = Scattered::new(out);
    threads.tasks(tiles, |tile| {
        let (row, col) = (
            tile / tile_columns * tile_rows,
            tile % tile_columns * tile_cols,
        );
        let (rows, cols) = (tile_rows.min(m - row), tile_cols.min(n - col));
        let extent = Extent {
            m: rows,
            n: cols,
            k,
        };
        let mut a_panel = Vec::new();
        let mut b_panel = Vec::new();
        let a = f32_panel(a, row, 0, rows, k, &mut a_panel);
        let b = f32_panel(b, 0, col, k, cols, &mut b_panel);
        let mut sums = vec![0.0f32; rows * cols];
        multiply(&mut sums, cols, extent, a, b, scale, false);
        for (r, sums) in sums.chunks_exact(cols).enumerate() {
            // SAFETY: tiles do not overlap, and this is a row of this tile.
            let out = unsafe { out.at((row + r) * n + col, cols) };
            store(
                out,
                sums,
                bias.map(|bias| &bias[col..col + cols]),
                accumulate,
            );
        }
    });
}

fn store<T: Element, O: Element>(
    out: &mut [O],
    sums: &[f32],
    bias: Option<&[T]>,
    accumulate: bool,
) {
    match (bias, accumulate) {
        (None, false) => {
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = O::from_f32(sum);
            }
        }
        (None, true) => {
            for (out, &sum) in out.iter_mut().zip(sums) {
                *out = O::from_f32(out.to_f32() + sum);
            }
        }
        (Some(bias), accumulate) => {
            for ((out, &sum), bias) in out.iter_mut().zip(sums).zip(bias) {
                let before = if accumulate { out.to_f32() } else { 0.0 };
                *out = O::from_f32(before + sum + bias.to_f32());
            }
        }
    }
}

/// The part of a matrix that one tile needs, as f32: a view where it is f32 already, else a copy.
fn f32_panel<'a, T: Element>(
    matrix: Matrix<'a, T>,
    row: usize,
    col: usize,
    rows: usize,
    cols: usize,
    panel: &'a mut Vec<f32>,
) -> Matrix<'a, f32> {
    let start = row * matrix.row_stride + col * matrix.col_stride;
    let values = &matrix.values[start..];
    if let Some(values) = T::as_f32(values) {
        return Matrix {
            values,
            row_stride: matrix.row_stride,
            col_stride: matrix.col_stride,
        };
    }
    panel.resize(rows * cols, 0.0);
    if matrix.col_stride == 1 {
        for (r, out) in panel.chunks_exact_mut(cols).enumerate() {
            T::widen(out, &values[r * matrix.row_stride..][..cols]);
        }
        Matrix::rows(panel, cols)
    } else {
        for (c, out) in panel.chunks_exact_mut(rows).enumerate() {
            T::widen(out, &values[c * matrix.col_stride..][..rows]);
        }
        Matrix::transposed(panel, rows)
    }
}
