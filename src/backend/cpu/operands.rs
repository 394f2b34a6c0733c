//! The operands of a matrix product, in the order in which kernels read them.

use super::strips::{self, Panels};
use super::transpose::transpose;
use crate::backend::Element;

/// Rows of a product from which on its right operand is worth bringing into another order.
const ROWS_WORTH_COPYING: usize = 16;

/// m, n, k of `[m, k] [k, n] -> [m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Rows of the output.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
}

/// The order of a product's operands, and with it who multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Rows on the left, panels of columns on the right, for our kernels ([`strips`]).
    Panels,
    /// Rows on the right, for the `gemm` crate, whose own packing of columns takes a tenth of a product of
    /// 512 rows.
    Rows,
    /// As they are stored, for the `gemm` crate.
    Stored,
}

impl Order {
    /// The best on this processor for a product with `m` rows.
    pub fn for_rows(m: usize) -> Self {
        match (m >= ROWS_WORTH_COPYING, strips::supported()) {
            (true, true) => Order::Panels,
            (true, false) => Order::Rows,
            (false, _) => Order::Stored,
        }
    }
}

/// A matrix inside a slice, by its strides, one of which is 1.
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
    pub fn part(self, row: usize, col: usize) -> Self {
        Matrix {
            values: &self.values[row * self.row_stride + col * self.col_stride..],
            ..self
        }
    }

    /// Whether `rows` rows of `cols` values lie inside the slice.
    pub fn holds(&self, rows: usize, cols: usize) -> bool {
        rows == 0
            || cols == 0
            || (rows - 1) * self.row_stride + (cols - 1) * self.col_stride < self.values.len()
    }

    fn has_rows(&self) -> bool {
        self.col_stride == 1
    }
}

impl<'a, T: Element> Matrix<'a, T> {
    /// The matrix itself where it is f32 already.
    fn as_f32(&self) -> Option<Matrix<'a, f32>> {
        Some(Matrix {
            values: T::as_f32(self.values)?,
            row_stride: self.row_stride,
            col_stride: self.col_stride,
        })
    }

    /// The first rows and columns in f32, copied to `memory` (`rows * cols` values) in the order that
    /// they have.
    fn widened(self, rows: usize, cols: usize, memory: &mut [f32]) -> Matrix<'_, f32> {
        let (stride, width) = if self.has_rows() {
            (self.row_stride, cols)
        } else {
            (self.col_stride, rows)
        };
        for (index, out) in memory.chunks_exact_mut(width).enumerate() {
            T::widen(out, &self.values[index * stride..][..width]);
        }
        if self.has_rows() {
            Matrix::rows(memory, cols)
        } else {
            Matrix::transposed(memory, rows)
        }
    }

    /// The same as rows.
    fn as_rows(self, rows: usize, cols: usize, memory: &mut [f32]) -> Matrix<'_, f32> {
        if self.has_rows() {
            return self.widened(rows, cols, memory);
        }
        transpose(memory, cols, self.values, self.col_stride, rows, cols);
        Matrix::rows(memory, cols)
    }

    /// Values of memory that [`Matrix::left`] needs.
    pub fn left_len(&self, order: Order, rows: usize, cols: usize) -> usize {
        let read_in_place =
            T::as_f32(self.values).is_some() && (order != Order::Panels || self.has_rows());
        if read_in_place { 0 } else { rows * cols }
    }

    /// The first `rows` rows and `cols` columns as a left operand, in `memory` of [`Matrix::left_len`]
    /// where they have to be copied.
    pub fn left<'m>(
        self,
        order: Order,
        rows: usize,
        cols: usize,
        memory: &'m mut [f32],
    ) -> Matrix<'m, f32>
    where
        'a: 'm,
    {
        match self.as_f32() {
            Some(matrix) if memory.is_empty() => matrix,
            _ if order == Order::Panels => self.as_rows(rows, cols, memory),
            _ => self.widened(rows, cols, memory),
        }
    }
}

/// A right operand.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// In panels.
    Panels(Panels<'a>),
    /// By its strides.
    Matrix(Matrix<'a, f32>),
}

impl<'a> Right<'a> {
    /// Values of memory that [`Right::new`] needs.
    pub fn len<T: Element>(order: Order, b: Matrix<'_, T>, rows: usize, cols: usize) -> usize {
        let read_in_place =
            T::as_f32(b.values).is_some() && (order == Order::Stored || b.has_rows());
        match order {
            Order::Panels => Panels::len(rows, cols),
            _ if read_in_place => 0,
            _ => rows * cols,
        }
    }

    /// The first `rows` rows and `cols` columns of b, in `memory` of [`Right::len`] where they have to
    /// be copied.
    pub fn new<T: Element>(
        order: Order,
        b: Matrix<'a, T>,
        rows: usize,
        cols: usize,
        memory: &'a mut [f32],
    ) -> Self {
        match (order, b.as_f32()) {
            (Order::Panels, _) => Right::Panels(Panels::pack(b, rows, cols, memory)),
            (_, Some(matrix)) if memory.is_empty() => Right::Matrix(matrix),
            (Order::Rows, _) => Right::Matrix(b.as_rows(rows, cols, memory)),
            (Order::Stored, _) => Right::Matrix(b.widened(rows, cols, memory)),
        }
    }
}
