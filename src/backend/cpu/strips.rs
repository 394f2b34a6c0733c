//! Matrix products on AVX-512: strips of rows of the left operand times panels of columns of the right one.
//!
//! 6 rows and 64 columns of the output are held in 24 of the 32 vector registers for the length of a
//! sum. Each step of it reads four registers of a panel, which lies in the order of those reads, and 6
//! single values of the left operand, each from a row of its own, as they are stored. Strips of 12 rows
//! and 32 columns have as many products in flight, but 14 reads to a step instead of 10: no slower on an AMD
//! EPYC (Zen 5) by itself, they lose a quarter where other work shares the core.
//!
//! An element of the output is one sum in the order of k, whatever the extent and whichever rows and
//! columns are computed beside it.

use multiversion::multiversion;

use super::operands::{Extent, Matrix};
use super::transpose::{prefetch, transpose};
use crate::backend::Element;

/// Columns of a panel; those of the last are filled up to whole registers.
const PANEL: usize = 4 * LANES;
/// Values of a vector register.
const LANES: usize = 16;
/// Rows that memory is asked for before they are copied: a third less time, an AMD EPYC (Zen 5).
const ROWS_AHEAD: usize = 16;

/// Whether this processor has AVX-512.
pub fn supported() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A right operand, `[depth, cols]`, cut into panels of 64 columns, each of which is a matrix of its own.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    values: &'a [f32],
    depth: usize,
    cols: usize,
}

impl<'a> Panels<'a> {
    /// Values in panels of this shape.
    pub fn len(depth: usize, cols: usize) -> usize {
        depth * cols.next_multiple_of(LANES)
    }

    /// Puts the first `depth` rows and `cols` columns of b into panels, in `memory` of
    /// [`Panels::len`] values.
    pub fn pack<T: Element>(
        b: Matrix<'_, T>,
        depth: usize,
        cols: usize,
        memory: &'a mut [f32],
    ) -> Self {
        if !cols.is_multiple_of(LANES) {
            let last = cols / PANEL * PANEL;
            memory[last * depth..].fill(0.0);
        }
        if b.col_stride == 1 {
            pack_rows(memory, b.values, b.row_stride, depth, cols);
        } else {
            for first in (0..cols).step_by(PANEL) {
                let stride = panel_stride(first, cols);
                let panel = &mut memory[first * depth..][..stride * depth];
                let (b, width) = (b.part(0, first), PANEL.min(cols - first));
                transpose(panel, stride, b.values, b.col_stride, depth, width);
            }
        }
        Panels {
            values: memory,
            depth,
            cols,
        }
    }

    /// Where the panel of these columns starts, and the values from one of its rows to the next.
    fn panel(&self, first: usize) -> (&'a [f32], usize) {
        let stride = panel_stride(first, self.cols);
        (&self.values[first * self.depth..], stride)
    }
}

/// Values from one row to the next of the panel of the columns from `first` on.
fn panel_stride(first: usize, cols: usize) -> usize {
    PANEL.min(cols.next_multiple_of(LANES) - first)
}

/// Rows into panels, one row after the other, as they lie in memory.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn pack_rows<T: Element>(out: &mut [f32], x: &[T], stride: usize, depth: usize, cols: usize) {
    for row in 0..depth {
        for first in (0..cols).step_by(LANES) {
            prefetch(x, (row + ROWS_AHEAD) * stride + first);
        }
        for (index, x) in x[row * stride..][..cols].chunks(PANEL).enumerate() {
            let first = index * PANEL;
            let out = &mut out[first * depth + row * panel_stride(first, cols)..][..x.len()];
            for (out, x) in out.iter_mut().zip(x) {
                *out = x.to_f32();
            }
        }
    }
}

/// What the sums are added to.
#[derive(Clone, Copy, Default)]
pub struct Start<'a> {
    /// What the output holds.
    pub keep: bool,
    /// A value for each column.
    pub bias: Option<&'a [f32]>,
}

impl Start<'_> {
    /// What the output holds, alone.
    pub fn kept() -> Self {
        Start {
            keep: true,
            bias: None,
        }
    }
}

/// `out = scale * a b + start`, on one thread.
///
/// # Safety
/// The processor must have AVX-512F. The `n` values from `out` on, and those `out_stride` further for
/// each of `m` rows, must be valid for reading and writing, and nobody else's.
#[cfg(target_arch = "x86_64")]
pub unsafe fn multiply(
    out: *mut f32,
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: &Panels<'_>,
    scale: f32,
    start: Start<'_>,
) {
    let Extent { m, n, k } = extent;
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.holds(m, k), "product reads outside of its left operand");
    assert!(
        n <= b.cols && k <= b.depth && b.values.len() >= Panels::len(b.depth, b.cols),
        "product reads outside of its right operand"
    );
    assert!(
        start.bias.is_none_or(|bias| bias.len() >= n),
        "product reads outside of its bias"
    );
    let in_rows = a.col_stride == 1;
    assert!(in_rows || a.row_stride == 1, "left operand without order");
    // Rows are shared out evenly: three strips of 5 rows are quicker than two of 6 and one of 3.
    let strips = m.div_ceil(avx512::STRIP);
    // While a strip is computed, memory is asked for the next, some of its rows with each panel.
    let rows_ahead = avx512::STRIP.div_ceil(n.div_ceil(PANEL));
    let mut first_row = 0;
    for strip in 0..strips {
        let rows = m / strips + usize::from(strip < m % strips);
        for first in (0..n).step_by(PANEL) {
            let (panel, panel_stride) = b.panel(first);
            let row_ahead = first_row + rows + first / PANEL * rows_ahead;
            let left = a.values.as_ptr();
            let tile = avx512::Tile {
                out: out.wrapping_add(first_row * out_stride + first),
                out_stride,
                cols: PANEL.min(n - first),
                a: left.wrapping_add(first_row * a.row_stride),
                a_stride: if in_rows { a.row_stride } else { a.col_stride },
                ahead: left.wrapping_add(row_ahead * a.row_stride),
                rows_ahead: if in_rows { rows_ahead } else { 0 },
                b: panel.as_ptr(),
                b_stride: panel_stride,
                depth: k,
                scale,
                keep: start.keep,
                bias: start.bias.map(|bias| bias[first..].as_ptr()),
            };
            // SAFETY: the processor has the instructions, and the tile is inside of all operands: of the output
            // by the caller's promise, of the others by the assertions above.
            unsafe { tile.compute(rows, in_rows) };
        }
        first_row += rows;
    }
}

/// The same where there is no AVX-512, and so nobody makes panels: one value at a time.
///
/// # Safety
/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub unsafe fn multiply(
    out: *mut f32,
    out_stride: usize,
    extent: Extent,
    a: Matrix<'_, f32>,
    b: &Panels<'_>,
    scale: f32,
    start: Start<'_>,
) {
    for row in 0..extent.m {
        for col in 0..extent.n {
            let (panel, stride) = b.panel(col / PANEL * PANEL);
            let term = |step: usize| {
                let left = a.values[row * a.row_stride + step * a.col_stride];
                left * panel[step * stride + col % PANEL]
            };
            let sum = scale * (0..extent.k).map(term).sum::<f32>();
            // SAFETY: a place of the output, which the caller vouches for.
            let out = unsafe { &mut *out.add(row * out_stride + col) };
            let kept = if start.keep { *out } else { 0.0 };
            *out = sum + start.bias.map_or(0.0, |bias| bias[col]) + kept;
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __mmask16, _MM_HINT_T0, _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_fmadd_ps,
        _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_mul_ps,
        _mm512_set1_ps, _mm512_setzero_ps,
    };

    use super::LANES;

    /// Most rows of a strip.
    pub const STRIP: usize = 6;

    /// A strip of rows times a panel.
    pub struct Tile {
        pub out: *mut f32,
        pub out_stride: usize,
        /// Columns of the output, at most those of a panel.
        pub cols: usize,
        pub a: *const f32,
        /// From one row to the next, or from one column to the next where rows lie side by side.
        pub a_stride: usize,
        /// Rows that memory is asked for on the way, where a has rows.
        pub ahead: *const f32,
        pub rows_ahead: usize,
        pub b: *const f32,
        /// Columns of the panel, or what fills them up.
        pub b_stride: usize,
        /// Length of the sums.
        pub depth: usize,
        pub scale: f32,
        pub keep: bool,
        pub bias: Option<*const f32>,
    }

    impl Tile {
        /// Computes the tile of `rows` rows, at most [`STRIP`]. `in_rows`: columns of a lie beside each other,
        /// else its rows do.
        ///
        /// # Safety
        /// The processor must have AVX-512F; everything that extent and strides reach must be valid.
        pub unsafe fn compute(&self, rows: usize, in_rows: bool) {
            macro_rules! strips {
                ($($rows:literal)*) => {
                    match (rows, in_rows) {
                        $(
                            // SAFETY: as promised by the caller.
                            ($rows, true) => unsafe { self.rows::<$rows, true>() },
                            // SAFETY: as promised by the caller.
                            ($rows, false) => unsafe { self.rows::<$rows, false>() },
                        )*
                        _ => assert!(rows == 0, "strip of more than {STRIP} rows"),
                    }
                };
            }
            strips!(1 2 3 4 5 6);
        }

        /// # Safety
        /// As [`Tile::compute`].
        unsafe fn rows<const ROWS: usize, const IN_ROWS: bool>(&self) {
            // SAFETY: as promised by the caller.
            unsafe {
                match self.cols.div_ceil(LANES) {
                    1 => self.strip::<ROWS, 1, IN_ROWS>(),
                    2 => self.strip::<ROWS, 2, IN_ROWS>(),
                    3 => self.strip::<ROWS, 3, IN_ROWS>(),
                    _ => self.strip::<ROWS, 4, IN_ROWS>(),
                }
            }
        }

        #[target_feature(enable = "avx512f")]
        unsafe fn strip<const ROWS: usize, const VECTORS: usize, const IN_ROWS: bool>(&self) {
            // SAFETY: the caller of `compute` vouches for every place that this reads and writes: `depth` steps
            // of both operands, and `cols` values of each of the rows of the output and of the bias.
            unsafe {
                for row in 0..ROWS {
                    let out = self.out.add(row * self.out_stride);
                    for index in 0..VECTORS {
                        _mm_prefetch::<_MM_HINT_T0>(out.wrapping_add(LANES * index).cast());
                    }
                }
                let mut sums = [[_mm512_setzero_ps(); VECTORS]; ROWS];
                let (mut a, mut b) = (self.a, self.b);
                let (row_stride, col_stride) = match IN_ROWS {
                    true => (self.a_stride, 1),
                    false => (1, self.a_stride),
                };
                for step in 0..self.depth {
                    if step.is_multiple_of(LANES) {
                        for row in 0..self.rows_ahead {
                            let ahead = self.ahead.wrapping_add(row * self.a_stride + step);
                            _mm_prefetch::<_MM_HINT_T1>(ahead.cast());
                        }
                    }
                    let mut right = [_mm512_setzero_ps(); VECTORS];
                    for (index, right) in right.iter_mut().enumerate() {
                        *right = _mm512_loadu_ps(b.add(LANES * index));
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let left = _mm512_set1_ps(*a.add(row * row_stride));
                        for (sum, &right) in sums.iter_mut().zip(&right) {
                            *sum = _mm512_fmadd_ps(left, right, *sum);
                        }
                    }
                    a = a.wrapping_add(col_stride);
                    b = b.wrapping_add(self.b_stride);
                }
                let scale = _mm512_set1_ps(self.scale);
                for (row, sums) in sums.into_iter().enumerate() {
                    for (index, sum) in sums.into_iter().enumerate() {
                        let first = LANES * index;
                        let left = self.cols - first;
                        let mask = __mmask16::MAX >> (LANES - left.min(LANES));
                        let out = self.out.add(row * self.out_stride + first);
                        let mut value = _mm512_mul_ps(scale, sum);
                        if let Some(bias) = self.bias {
                            value =
                                _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, bias.add(first)));
                        }
                        if self.keep {
                            value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, out));
                        }
                        _mm512_mask_storeu_ps(out, mask, value);
                    }
                }
            }
        }
    }
}
