//! Weight-only quantisation to int8 and int4, on host values.
//!
//! As THUDM's ChatGLM-6B does it (`quantization.py`): one float16 scale per output row, codes from the
//! float16-rounded quotient, int4 codes packed two to a byte. Bits of a checkpoint that was quantised
//! elsewhere are therefore the bits made here.

use half::f16;

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
    fn row_bytes(self, cols: usize) -> usize {
        match self {
            Bits::Eight => cols,
            Bits::Four => cols / 2,
        }
    }
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
        check_shape(weight.len(), rows, cols, bits)?;
        if let Some(index) = weight.iter().position(|w| !w.is_finite()) {
            return Err(QuantError::NotFinite {
                row: index / cols,
                col: index % cols,
            });
        }
        let mut matrix = QuantisedMatrix {
            bits,
            rows,
            cols,
            codes: Vec::with_capacity(rows * bits.row_bytes(cols)),
            scales: vec![f16::ZERO; rows],
        };
        for (row, scale) in weight.chunks_exact(cols.max(1)).zip(&mut matrix.scales) {
            *scale = row_scale(row, bits);
            let codes: Vec<i8> = row.iter().map(|&w| code(w, *scale, bits)).collect();
            pack(&mut matrix.codes, &codes, bits);
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
        if bits == Bits::Four && !cols.is_multiple_of(2) {
            return Err(QuantError::OddColumns { cols });
        }
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
            // An arithmetic shift brings the sign of the high half down; the low half takes its own
            // sign by being shifted up first.
            Bits::Four => {
                let pairs = self.codes.iter();
                pairs
                    .flat_map(|&byte| [byte >> 4, (byte << 4) >> 4])
                    .collect()
            }
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

fn check_shape(values: usize, rows: usize, cols: usize, bits: Bits) -> Result<(), QuantError> {
    if rows.checked_mul(cols) != Some(values) {
        return Err(QuantError::Shape { rows, cols, values });
    }
    if bits == Bits::Four && !cols.is_multiple_of(2) {
        return Err(QuantError::OddColumns { cols });
    }
    Ok(())
}

fn row_scale(row: &[f16], bits: Bits) -> f16 {
    let magnitudes = row.iter().map(|w| w.to_f32().abs());
    let largest = magnitudes.fold(0.0, f32::max);
    f16::from_f32(largest / f32::from(bits.largest_code()))
}

fn code(weight: f16, scale: f16, bits: Bits) -> i8 {
    if scale == f16::ZERO {
        return 0;
    }
    let quotient = f16::from_f32(weight.to_f32() / scale.to_f32()).to_f32();
    let largest = f32::from(bits.largest_code());
    quotient.round_ties_even().clamp(-largest - 1.0, largest) as i8
}

fn pack(out: &mut Vec<i8>, codes: &[i8], bits: Bits) {
    match bits {
        Bits::Eight => out.extend(codes),
        Bits::Four => {
            let (pairs, _) = codes.as_chunks::<2>();
            out.extend(pairs.iter().map(|[even, odd]| (even << 4) | (odd & 0x0f)));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

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
        let mut packed = Vec::new();
        pack(&mut packed, &codes, Bits::Four);
        let scales = vec![f16::ONE];
        let matrix = QuantisedMatrix::from_stored(packed, scales, codes.len(), Bits::Four).unwrap();
        assert_eq!(matrix.unpacked(), codes);
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
