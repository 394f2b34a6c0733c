//! Columns of a matrix brought into rows, block by block.
//!
//! Where the processor has AVX-512, values change places inside registers, which is several times as fast
//! as one value at a time. Nothing is computed, so every way gives the same bits.

use multiversion::multiversion;

use crate::backend::Element;

/// A block's rows are a line of the cache each, in and out.
const BLOCK: usize = 16;

/// `out[r, c] = x[c, r]`, widened, for `rows` rows and `cols` columns of `out`, whose rows are `out_stride`
/// apart; those of x are `stride` apart.
pub fn transpose<T: Element>(
    out: &mut [f32],
    out_stride: usize,
    x: &[T],
    stride: usize,
    rows: usize,
    cols: usize,
) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!((cols - 1) * stride + rows <= x.len());
    assert!((rows - 1) * out_stride + cols <= out.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512F.
        unsafe { avx512::blocks(out, out_stride, x, stride, rows, cols) };
        return;
    }
    blocks(out, out_stride, x, stride, rows, cols);
}

/// Asks memory for the line of the cache at `place`, which may lie outside of x.
#[inline(always)]
pub fn prefetch<T>(x: &[T], place: usize) {
    let line = x.as_ptr().wrapping_add(place);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it fails for no address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn blocks<T: Element>(
    out: &mut [f32],
    out_stride: usize,
    x: &[T],
    stride: usize,
    rows: usize,
    cols: usize,
) {
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
            for row in 0..height {
                let out = &mut out[(first_row + row) * out_stride + first_col..][..width];
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
        __m512, __mmask16, _mm512_castpd_ps, _mm512_castps_pd, _mm512_loadu_ps,
        _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_f32x4,
        _mm512_unpackhi_pd, _mm512_unpackhi_ps, _mm512_unpacklo_pd, _mm512_unpacklo_ps,
    };

    use super::{BLOCK, prefetch};
    use crate::backend::Element;

    /// As [`super::transpose`].
    #[target_feature(enable = "avx512f")]
    pub fn blocks<T: Element>(
        out: &mut [f32],
        out_stride: usize,
        x: &[T],
        stride: usize,
        rows: usize,
        cols: usize,
    ) {
        for first_col in (0..cols).step_by(BLOCK) {
            let width = BLOCK.min(cols - first_col);
            for first_row in (0..rows).step_by(BLOCK) {
                let height = BLOCK.min(rows - first_row);
                let mut block = [_mm512_setzero_ps(); BLOCK];
                for (col, values) in block.iter_mut().enumerate().take(width) {
                    let place = (first_col + col) * stride + first_row;
                    prefetch(x, place + BLOCK * stride);
                    *values = load(&x[place..][..height]);
                }
                let columns = transposed(block);
                for (row, &values) in columns.iter().enumerate().take(height) {
                    let out = &mut out[(first_row + row) * out_stride + first_col..][..width];
                    // SAFETY: the mask has a bit for each value of `out`, of which there are at most 16.
                    unsafe { _mm512_mask_storeu_ps(out.as_mut_ptr(), mask(width), values) };
                }
            }
        }
    }

    /// A bit for each of the first `len` lanes, at least one.
    fn mask(len: usize) -> __mmask16 {
        __mmask16::MAX >> (BLOCK - len)
    }

    /// Up to 16 values, widened, and zeros.
    #[target_feature(enable = "avx512f")]
    fn load<T: Element>(x: &[T]) -> __m512 {
        if let Some(x) = T::as_f32(x) {
            // SAFETY: the mask has a bit for each value of x, of which there are at most 16.
            return unsafe { _mm512_maskz_loadu_ps(mask(x.len()), x.as_ptr()) };
        }
        let mut values = [0.0; BLOCK];
        for (value, x) in values.iter_mut().zip(x) {
            *value = x.to_f32();
        }
        // SAFETY: 16 values.
        unsafe { _mm512_loadu_ps(values.as_ptr()) }
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
    use half::f16;

    use super::*;

    fn places<T: Element + PartialEq>() {
        for (rows, cols, stride, out_stride) in [
            (1, 1, 1, 1),
            (16, 16, 16, 16),
            (3, 65, 7, 65),
            (65, 97, 70, 112),
            (97, 48, 97, 50),
        ] {
            // `cols` rows of x, of which the first `rows` values count. f16 has integers up to 2,048.
            let x: Vec<T> = (0..cols * stride)
                .map(|i| T::from_f32((i * 7 % 2039) as f32))
                .collect();
            let mut out = vec![-1.0; rows * out_stride];
            let mut plain = out.clone();
            transpose(&mut out, out_stride, &x, stride, rows, cols);
            blocks(&mut plain, out_stride, &x, stride, rows, cols);
            for (place, value) in out.iter().enumerate() {
                let (row, col) = (place / out_stride, place % out_stride);
                let expected = if col < cols {
                    x[col * stride + row].to_f32()
                } else {
                    -1.0
                };
                assert_eq!(*value, expected, "{row} {col}");
            }
            assert_eq!(out, plain, "{rows} x {cols}");
        }
    }

    #[test]
    fn every_value_finds_its_place() {
        places::<f32>();
        places::<f16>();
    }
}
