//! Weight-only quantisation to int8 and int4, on host values.
//!
//! As THUDM's ChatGLM-6B does it (`quantization.py`): one float16 scale per output row, codes from the
//! float16-rounded quotient, int4 codes packed two to a byte. Bits of a checkpoint that was quantised
//! elsewhere are therefore the bits made here.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::random::NEAR_NORMAL_LARGEST;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Why a matrix cannot be quantised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantError {
    /// The number of values is not rows times columns.
    #[error("a matrix of {rows} rows and {cols} columns has not {values} values")]
    Shape {
        /// Rows.
        rows: usize,
        /// Columns.
        cols: usize,
        /// Values given.
        values: usize,
    },
    /// Two int4 codes share a byte, so their number must be even.
    #[error("int4 packs two columns into a byte; {cols} columns are odd")]
    OddColumns {
        /// Columns.
        cols: usize,
    },
    /// An infinity or a NaN among the scales.
    #[error("the scale of row {row} is not finite: download the folder again")]
    Scale {
        /// Row, from 0.
        row: usize,
    },
    /// An infinity or a NaN among the weights.
    #[error("the weight at row {row}, column {col} is not finite")]
    NotFinite {
        /// Row, from 0.
        row: usize,
        /// Column, from 0.
        col: usize,
    },
}

/// Width of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bits {
    /// -128 ..= 127, a code per byte.
    Eight,
    /// -8 ..= 7, two codes per byte: the even column in the high half, the odd one in the low half.
    Four,
}

impl Bits {
    /// The largest code, which the largest weight of a row is mapped to.
    pub fn largest_code(self) -> i8 {
        match self {
            Bits::Eight => 127,
            Bits::Four => 7,
        }
    }

    /// Bytes of a row of `cols` codes.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Bits::Eight => cols,
            Bits::Four => cols / 2,
        }
    }
}

impl Bits {
    /// The code that a number of [`near_normal`](crate::random::near_normal) becomes: cut towards 0, so that
    /// the largest is the largest code and the mean is 0.
    #[inline(always)]
    pub fn code_of(self, number: i32) -> i8 {
        // Within the codes, as `number` is at most the largest.
        (number / (NEAR_NORMAL_LARGEST / i32::from(self.largest_code()))) as i8
    }

    /// The scale that gives such codes this standard deviation.
    pub fn scale_for(self, deviation: f32) -> f16 {
        let of_codes = match self {
            Bits::Eight => 36.648_743,
            Bits::Four => 1.695_201,
        };
        f16::from_f32(deviation / of_codes)
    }

    /// The weights that a row of codes stands for, `f16(code * scale)`; `out` has as many values as
    /// the row has columns.
    pub fn dequantise_row(self, out: &mut [f32], codes: &[i8], scale: f16) {
        let scale = scale.to_f32();
        let value = |code: i8| f16::from_f32(f32::from(code) * scale).to_f32();
        match self {
            Bits::Eight => {
                let codes = out.iter_mut().zip(codes);
                codes.for_each(|(out, &code)| *out = value(code));
            }
            Bits::Four => {
                let codes = codes.iter().copied().flat_map(pair);
                let codes = out.iter_mut().zip(codes);
                codes.for_each(|(out, code)| *out = value(code));
            }
        }
    }
}

/// The even and the odd column's code in a byte of int4. An arithmetic shift brings the sign of the high
/// half down; the low half takes its own sign by being shifted up first.
fn pair(byte: i8) -> [i8; 2] {
    [byte >> 4, (byte << 4) >> 4]
}

/// A quantised matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantisedMatrix {
    /// Width of a code.
    pub bits: Bits,
    /// Output rows, O.
    pub rows: usize,
    /// Input columns, I.
    pub cols: usize,
    /// Codes as they are stored: `[O, I]` bytes for int8, `[O, I / 2]` for int4.
    pub codes: Vec<i8>,
    /// Scale of each row, `[O]`.
    pub scales: Vec<f16>,
}

impl QuantisedMatrix {
    /// Quantises `weight [rows, cols]`: `scale = f16(max|w| / largest code)` per row and
    /// `code = round half to even (f16(w / scale))`.
    ///
    /// A row of zeros gets scale 0 and codes 0. Where a tiny scale is rounded so far down that a
    /// quotient leaves the range of codes, the code is the nearest one that exists.
    ///
    /// # Errors
    /// `weight` has not `rows * cols` values, one is not finite, or int4 meets an odd `cols`.
    pub fn quantise(
        weight: &[f16],
        rows: usize,
        cols: usize,
        bits: Bits,
    ) -> Result<Self, QuantError> {
        if rows.checked_mul(cols) != Some(weight.len()) {
            let values = weight.len();
            return Err(QuantError::Shape { rows, cols, values });
        }
        check_cols(cols, bits)?;
        let row_bytes = bits.row_bytes(cols);
        let mut matrix = QuantisedMatrix {
            bits,
            rows,
            cols,
            codes: vec![0; rows * row_bytes],
            scales: vec![f16::ZERO; rows],
        };
        if cols == 0 {
            return Ok(matrix);
        }
        let codes = matrix.codes.chunks_exact_mut(row_bytes);
        let weights = weight.chunks_exact(cols);
        for (row, ((codes, weights), scale)) in
            codes.zip(weights).zip(&mut matrix.scales).enumerate()
        {
            *scale = quantise_row(codes, weights, bits)
                .map_err(|col| QuantError::NotFinite { row, col })?;
        }
        Ok(matrix)
    }

    /// Takes codes and scales as they are stored.
    ///
    /// # Errors
    /// Their number does not fit `rows` and `cols`, or int4 meets an odd `cols`.
    pub fn from_stored(
        codes: Vec<i8>,
        scales: Vec<f16>,
        cols: usize,
        bits: Bits,
    ) -> Result<Self, QuantError> {
        let rows = scales.len();
        check_cols(cols, bits)?;
        if rows.checked_mul(bits.row_bytes(cols)) != Some(codes.len()) {
            return Err(QuantError::Shape {
                rows,
                cols,
                values: codes.len(),
            });
        }
        Ok(QuantisedMatrix {
            bits,
            rows,
            cols,
            codes,
            scales,
        })
    }

    /// The codes one by one, `[O, I]`.
    pub fn unpacked(&self) -> Vec<i8> {
        match self.bits {
            Bits::Eight => self.codes.clone(),
            Bits::Four => self.codes.iter().copied().flat_map(pair).collect(),
        }
    }

    /// The weights that the codes stand for, `f16(code * scale)`, `[O, I]`.
    pub fn dequantised(&self) -> Vec<f16> {
        self.products().map(f16::from_f32).collect()
    }

    /// `code * scale` without the rounding to f16, `[O, I]`.
    pub fn dequantised_unrounded(&self) -> Vec<f32> {
        self.products().collect()
    }

    fn products(&self) -> impl Iterator<Item = f32> {
        let codes = self.unpacked().into_iter().enumerate();
        codes.map(|(index, code)| f32::from(code) * self.scales[index / self.cols].to_f32())
    }
}

/// Whether rows of `cols` weights can be stored with codes of this width.
///
/// # Errors
/// int4 and an odd number.
pub fn check_cols(cols: usize, bits: Bits) -> Result<(), QuantError> {
    match bits == Bits::Four && !cols.is_multiple_of(2) {
        true => Err(QuantError::OddColumns { cols }),
        false => Ok(()),
    }
}

/// Weights that are quantised at a time: even, so that pairs stay together.
const BLOCK: usize = 512;

/// Quantises one row: `codes` gets its [`Bits::row_bytes`] bytes, and the scale is returned. The
/// number of weights is even with int4.
///
/// # Errors
/// The column of the first weight that is not finite.
pub fn quantise_row(codes: &mut [i8], weights: &[f16], bits: Bits) -> Result<f16, usize> {
    // Halves without their sign are ordered as their bits are; infinity and NaN come last.
    let largest = f16::from_bits(largest_magnitude(weights));
    if !largest.is_finite() {
        let col = weights.iter().position(|weight| !weight.is_finite());
        return Err(col.unwrap_or_default());
    }
    let scale = f16::from_f32(largest.to_f32() / f32::from(bits.largest_code()));
    if scale == f16::ZERO {
        codes.fill(0);
        return Ok(scale);
    }
    let mut block = [0; BLOCK];
    let rows = codes.chunks_mut(bits.row_bytes(BLOCK));
    for (out, weights) in rows.zip(weights.chunks(BLOCK)) {
        let block = &mut block[..weights.len()];
        codes_of(block, weights, scale, bits);
        pack(out, block, bits);
    }
    Ok(scale)
}

fn largest_magnitude(weights: &[f16]) -> u16 {
    #[cfg(target_arch = "x86_64")]
    if avx2::is_there() {
        // SAFETY: the processor has what it needs.
        return unsafe { avx2::largest_magnitude(weights) };
    }
    let magnitudes = weights.iter().map(|weight| weight.to_bits() & 0x7fff);
    magnitudes.fold(0, u16::max)
}

/// The codes of at most a block of weights.
fn codes_of(codes: &mut [i8], weights: &[f16], scale: f16, bits: Bits) {
    #[cfg(target_arch = "x86_64")]
    let (codes, weights) = if avx2::is_there() {
        let largest = f32::from(bits.largest_code());
        // SAFETY: the processor has what it needs.
        let done = unsafe { avx2::codes_of(codes, weights, scale.to_f32(), largest) };
        (&mut codes[done..], &weights[done..])
    } else {
        (codes, weights)
    };
    // Adding and taking it away again rounds to a whole number, ties to even: from here on floats are
    // whole.
    const WHOLE: f32 = 12_582_912.0;
    let (mut quotients, mut rounded) = ([0.0; BLOCK], [f16::ZERO; BLOCK]);
    let quotients = &mut quotients[..weights.len()];
    let rounded = &mut rounded[..weights.len()];
    weights.convert_to_f32_slice(quotients);
    let scale = scale.to_f32();
    for quotient in &mut *quotients {
        *quotient /= scale;
    }
    rounded.convert_from_f32_slice(quotients);
    rounded.convert_to_f32_slice(quotients);
    let largest = f32::from(bits.largest_code());
    for (code, quotient) in codes.iter_mut().zip(quotients) {
        *code = ((quotient.clamp(-largest - 1.0, largest) + WHOLE) - WHOLE) as i8;
    }
}

/// Codes as they are stored; `out` has the [`Bits::row_bytes`] of them.
pub fn pack(out: &mut [i8], codes: &[i8], bits: Bits) {
    match bits {
        Bits::Eight => out.copy_from_slice(codes),
        Bits::Four => {
            let (pairs, _) = codes.as_chunks::<2>();
            for (out, pair) in out.iter_mut().zip(pairs) {
                // Both codes in one word, which is done for many pairs at a time.
                let word = u16::from_le_bytes(pair.map(i8::cast_unsigned));
                *out = ((word << 4) & 0xf0 | (word >> 8) & 0x0f) as i8;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::{Domain, Key, near_normal};

    fn halves(values: &[f32]) -> Vec<f16> {
        values.iter().map(|&value| f16::from_f32(value)).collect()
    }

    #[test]
    fn the_largest_weight_of_a_row_gets_the_largest_code() {
        let weight = halves(&[0.5, -1.0, 0.0, 2.0, 1.0, -0.25]);
        let matrix = QuantisedMatrix::quantise(&weight, 2, 3, Bits::Eight).unwrap();
        assert_eq!(matrix.scales, halves(&[1.0 / 127.0, 2.0 / 127.0]));
        assert_eq!(matrix.codes[1], -127);
        assert_eq!(matrix.codes[3], 127);
        assert_eq!(matrix.codes[2], 0);
        let [first, ..] = matrix.dequantised()[..] else {
            panic!("no values")
        };
        assert!((first.to_f32() - 0.5).abs() <= matrix.scales[0].to_f32());
    }

    #[test]
    fn codes_of_near_normal_numbers_spread_as_their_scale_says() {
        let mut stream = Key::new(5, Domain::ModelInit).stream();
        let numbers: Vec<i32> = (0..200_000)
            .map(|_| near_normal(stream.next_word()))
            .collect();
        for bits in [Bits::Eight, Bits::Four] {
            let ends = [-NEAR_NORMAL_LARGEST, NEAR_NORMAL_LARGEST].map(|n| bits.code_of(n));
            assert_eq!(ends, [-bits.largest_code(), bits.largest_code()]);
            let scale = f64::from(bits.scale_for(0.02));
            let values = numbers.iter().map(|&n| f64::from(bits.code_of(n)) * scale);
            let (sum, squares) = values.fold((0.0, 0.0), |(sum, squares), value| {
                (sum + value, squares + value * value)
            });
            let count = numbers.len() as f64;
            assert!((sum / count).abs() < 2e-4, "{bits:?}: {}", sum / count);
            let deviation = (squares / count).sqrt();
            assert!(
                (deviation / 0.02 - 1.0).abs() < 0.01,
                "{bits:?}: {deviation}"
            );
        }
    }

    #[test]
    fn int4_has_the_even_column_in_the_high_half() {
        let weight = halves(&[7.0, -7.0, -1.0, 3.0]);
        let matrix = QuantisedMatrix::quantise(&weight, 1, 4, Bits::Four).unwrap();
        assert_eq!(matrix.scales, halves(&[1.0]));
        assert_eq!(matrix.codes.len(), 2);
        assert_eq!(matrix.codes[0] as u8, 0x79);
        assert_eq!(matrix.codes[1] as u8, 0xf3);
        assert_eq!(matrix.unpacked(), [7, -7, -1, 3]);
        assert_eq!(matrix.dequantised(), weight);
    }

    #[test]
    fn every_pair_of_int4_codes_survives_packing() {
        let codes: Vec<i8> = (-8..8)
            .flat_map(|a| (-8..8).flat_map(move |b| [a, b]))
            .collect();
        let mut packed = vec![0; codes.len() / 2];
        pack(&mut packed, &codes, Bits::Four);
        let scales = vec![f16::ONE];
        let matrix = QuantisedMatrix::from_stored(packed, scales, codes.len(), Bits::Four).unwrap();
        assert_eq!(matrix.unpacked(), codes);
    }

    /// One weight's code, by the definition.
    fn code(weight: f16, scale: f16, bits: Bits) -> i8 {
        let quotient = f16::from_f32(weight.to_f32() / scale.to_f32()).to_f32();
        let largest = f32::from(bits.largest_code());
        quotient.round_ties_even().clamp(-largest - 1.0, largest) as i8
    }

    /// Every finite half, in rows of every magnitude, longer and shorter than a block.
    #[test]
    fn blocks_of_codes_are_those_of_one_weight_after_another() {
        let finite = |bits: u16| f16::from_bits(bits).is_finite();
        let all: Vec<f16> = (0..=u16::MAX)
            .filter(|&bits| finite(bits))
            .map(f16::from_bits)
            .collect();
        let mut sorted = all;
        sorted.sort_by(|a, b| a.to_f32().abs().total_cmp(&b.to_f32().abs()));
        for (bits, cols) in [
            (Bits::Eight, 1),
            (Bits::Eight, 700),
            (Bits::Eight, 2 * BLOCK),
            (Bits::Four, 6),
            (Bits::Four, 1030),
        ] {
            for weights in sorted.chunks_exact(cols) {
                let matrix = QuantisedMatrix::quantise(weights, 1, cols, bits).unwrap();
                let scale = matrix.scales[0];
                let largest = weights[cols - 1].to_f32().abs();
                assert_eq!(
                    scale,
                    f16::from_f32(largest / f32::from(bits.largest_code()))
                );
                let expected = weights.iter().map(|&weight| match scale == f16::ZERO {
                    true => 0,
                    false => code(weight, scale, bits),
                });
                assert_eq!(matrix.unpacked(), expected.collect::<Vec<i8>>());
            }
        }
    }

    /// A quotient a little off k + 1/2 that float16 rounds onto k + 1/2 goes to the even code.
    #[test]
    fn the_quotient_is_rounded_to_float16_before_it_becomes_a_code() {
        let scale = f16::from_f32(0.01);
        let differs = (1..=u16::MAX >> 1).map(f16::from_bits).find(|w| {
            let quotient = w.to_f32() / scale.to_f32();
            (64.0..126.0).contains(&quotient)
                && f32::from(code(*w, scale, Bits::Eight)) != quotient.round_ties_even()
        });
        let weight = differs.expect("a weight whose code depends on the rounding");
        let quotient = weight.to_f32() / scale.to_f32();
        assert!((quotient.fract() - 0.5).abs() < 0.04, "{quotient}");
    }

    #[test]
    fn rows_of_zeros_and_of_tiny_weights_stay_in_range() {
        let tiny = f16::from_bits(100);
        let weight = [f16::ZERO, f16::ZERO, tiny, -tiny];
        for bits in [Bits::Eight, Bits::Four] {
            let matrix = QuantisedMatrix::quantise(&weight, 2, 2, bits).unwrap();
            let codes = matrix.unpacked();
            assert_eq!(codes[..2], [0, 0]);
            assert!(codes[2] > 0 && codes[3] < 0, "{codes:?}");
            let values = matrix.dequantised();
            assert!(values.iter().all(|value| value.is_finite()));
            assert_eq!(values[..2], weight[..2]);
        }
    }

    #[test]
    fn bad_shapes_and_weights_are_refused() {
        let one = [f16::ONE; 3];
        let quantise = QuantisedMatrix::quantise;
        assert_eq!(
            quantise(&one, 1, 3, Bits::Four),
            Err(QuantError::OddColumns { cols: 3 })
        );
        assert!(matches!(
            quantise(&one, 2, 2, Bits::Eight),
            Err(QuantError::Shape { values: 3, .. })
        ));
        let bad = [f16::ONE, f16::NAN];
        let found = quantise(&bad, 2, 1, Bits::Eight);
        assert_eq!(found, Err(QuantError::NotFinite { row: 1, col: 0 }));
        assert!(QuantisedMatrix::from_stored(vec![0; 3], one.to_vec(), 2, Bits::Eight).is_err());
        assert!(quantise(&[], 0, 0, Bits::Eight).is_ok());
    }
}
