//! Columns of a matrix brought into rows, block by block.
//!
//! Where the processor has AVX-512, values of f32 blocks change places inside registers, which is several
//! times as fast as one value at a time. Nothing is computed, so every way gives the same bits.

use multiversion::multiversion;

use crate::backend::Element;

/// A block's rows are a line of the cache each, in and out.
const BLOCK: usize = 16;

/// `out[c, r] = x[r, c]`, as f32, for the columns of `out`, of which there are `cols`; the rows of x are
/// `stride` apart.
pub fn transpose<T: Element>(out: &mut [f32], x: &[T], stride: usize, cols: usize) {
    let rows = out.len() / cols;
    #[cfg(target_arch = "x86_64")]
    if let Some(x) = T::as_f32(x).filter(|_| is_x86_feature_detected!("avx512f")) {
        let (whole_rows, whole_cols) = (rows - rows % BLOCK, cols - cols % BLOCK);
        if whole_rows > 0 && whole_cols > 0 {
            // SAFETY: the processor has AVX-512F.
            unsafe { avx512::blocks(out, x, stride, cols, whole_rows, whole_cols) };
        }
        borders(out, x, stride, cols, whole_rows, whole_cols);
        return;
    }
    blocks(out, x, stride, cols, rows);
}

/// What lies behind the whole blocks: the last columns of all rows of `out`, and its last rows.
fn borders(
    out: &mut [f32],
    x: &[f32],
    stride: usize,
    cols: usize,
    whole_rows: usize,
    whole_cols: usize,
) {
    for (row, out) in out.chunks_exact_mut(cols).enumerate() {
        let first = if row < whole_rows { whole_cols } else { 0 };
        for (col, out) in out.iter_mut().enumerate().skip(first) {
            *out = x[col * stride + row];
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn blocks<T: Element>(out: &mut [f32], x: &[T], stride: usize, cols: usize, rows: usize) {
    let mut block = [[0.0f32; BLOCK]; BLOCK];
    for first_col in (0..cols).step_by(BLOCK) {
        let width = BLOCK.min(cols - first_col);
        for first_row in (0..rows).step_by(BLOCK) {
            let height = BLOCK.min(rows - first_row);
            for (col, values) in block.iter_mut().enumerate().take(width) {
                let x = &x[(first_col + col) * stride + first_row..][..height];
                for (value, x) in values.iter_mut().zip(x) {
                    *value = x.to_f32();
                }
            }
            let out = out[first_row * cols..].chunks_mut(cols).take(height);
            for (row, out) in out.enumerate() {
                let out = &mut out[first_col..][..width];
                for (out, values) in out.iter_mut().zip(&block) {
                    *out = values[row];
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512, _mm512_castpd_ps, _mm512_castps_pd, _mm512_loadu_ps, _mm512_setzero_ps,
        _mm512_shuffle_f32x4, _mm512_storeu_ps, _mm512_unpackhi_pd, _mm512_unpackhi_ps,
        _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };

    use super::BLOCK;

    /// The first `rows` rows and `cols` columns of `out`, whole blocks both, at least one.
    #[target_feature(enable = "avx512f")]
    pub fn blocks(
        out: &mut [f32],
        x: &[f32],
        stride: usize,
        out_stride: usize,
        rows: usize,
        cols: usize,
    ) {
        assert!(rows.is_multiple_of(BLOCK) && cols.is_multiple_of(BLOCK) && rows > 0 && cols > 0);
        assert!((cols - 1) * stride + rows <= x.len());
        assert!((rows - 1) * out_stride + cols <= out.len());
        for first_col in (0..cols).step_by(BLOCK) {
            for first_row in (0..rows).step_by(BLOCK) {
                let mut block = [_mm512_setzero_ps(); BLOCK];
                for (col, values) in block.iter_mut().enumerate() {
                    let place = (first_col + col) * stride + first_row;
                    // SAFETY: 16 values of row `first_col + col < cols` of x, inside by the assertion.
                    *values = unsafe { _mm512_loadu_ps(x.as_ptr().add(place)) };
                }
                for (row, values) in transposed(block).into_iter().enumerate() {
                    let place = (first_row + row) * out_stride + first_col;
                    // SAFETY: 16 values of row `first_row + row < rows` of `out`, inside by the assertion.
                    unsafe { _mm512_storeu_ps(out.as_mut_ptr().add(place), values) };
                }
            }
        }
    }

    /// Rows to columns: pairs of rows are mixed value by value, pairs of those two values at a time, and
    /// so on by quarters of a register.
    #[target_feature(enable = "avx512f")]
    fn transposed(rows: [__m512; BLOCK]) -> [__m512; BLOCK] {
        let mut pairs = rows;
        for i in 0..8 {
            pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
            pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
        }
        let mut fours = pairs;
        for i in 0..4 {
            let pair = |n: usize| _mm512_castps_pd(pairs[4 * i + n]);
            fours[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
            fours[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
            fours[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
            fours[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
        }
        // Quarter q of fours[4 j + i] holds rows 4 j to 4 j + 3 of column 4 q + i.
        let mut columns = fours;
        for i in 0..4 {
            let (a, b, c, d) = (fours[i], fours[4 + i], fours[8 + i], fours[12 + i]);
            let low = [
                _mm512_shuffle_f32x4::<0x44>(a, b),
                _mm512_shuffle_f32x4::<0x44>(c, d),
            ];
            let high = [
                _mm512_shuffle_f32x4::<0xee>(a, b),
                _mm512_shuffle_f32x4::<0xee>(c, d),
            ];
            columns[i] = _mm512_shuffle_f32x4::<0x88>(low[0], low[1]);
            columns[4 + i] = _mm512_shuffle_f32x4::<0xdd>(low[0], low[1]);
            columns[8 + i] = _mm512_shuffle_f32x4::<0x88>(high[0], high[1]);
            columns[12 + i] = _mm512_shuffle_f32x4::<0xdd>(high[0], high[1]);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_finds_its_place() {
        for (rows, cols, stride) in [
            (1, 1, 1),
            (16, 16, 16),
            (3, 65, 7),
            (65, 97, 70),
            (97, 48, 97),
        ] {
            // `cols` rows of x, of which the first `rows` values count.
            let x: Vec<f32> = (0..cols * stride).map(|i| i as f32).collect();
            let mut out = vec![-1.0; rows * cols];
            transpose(&mut out, &x, stride, cols);
            let mut plain = vec![-1.0; rows * cols];
            blocks(&mut plain, &x, stride, cols, rows);
            for row in 0..rows {
                for col in 0..cols {
                    assert_eq!(
                        out[row * cols + col],
                        (col * stride + row) as f32,
                        "{row} {col}"
                    );
                }
            }
            assert_eq!(out, plain, "{rows} x {cols}");
        }
    }
}
