//! Weights from int8 and int4 codes.

use half::f16;
use mp_train::backend::{Backend, Element};
use mp_train::quant::{Bits, QuantisedMatrix};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::Numbers;

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(13);
    for rows in [1, 3, 97] {
        for cols in [1, 2, 3, 8, 50, 65, 97, 144, 528] {
            dequantise(b, check, &mut numbers, rows, cols, Bits::Eight);
            if cols % 2 == 0 {
                dequantise(b, check, &mut numbers, rows, cols, Bits::Four);
            }
        }
    }
    // Longer than one sweep of a thread block.
    dequantise(b, check, &mut numbers, 2, 20_016, Bits::Eight);
    dequantise(b, check, &mut numbers, 2, 20_016, Bits::Four);
    every_code(b, check);
}

fn dequantise<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    rows: usize,
    cols: usize,
    bits: Bits,
) {
    let values = numbers.around(0.0, 0.2, rows * cols);
    let weight: Vec<f16> = values.iter().map(|&w| f16::from_f64(w)).collect();
    let matrix = QuantisedMatrix::quantise(&weight, rows, cols, bits).unwrap();
    run(
        b,
        check,
        &matrix,
        format!("{bits:?}, rows {rows}, cols {cols}"),
    );
}

/// Every byte, under scales from the smallest to one whose products overflow.
fn every_code<B: Backend>(b: &B, check: &mut Check) {
    let bytes: Vec<i8> = (i8::MIN..=i8::MAX).collect();
    let scales = [0x0001, 0x03ff, 0x1234, 0x3c00, 0x5c01, 0x7bff, 0x8400].map(f16::from_bits);
    for (bits, cols) in [(Bits::Eight, 256), (Bits::Four, 512)] {
        let codes = bytes.repeat(scales.len());
        let matrix = QuantisedMatrix::from_stored(codes, scales.to_vec(), cols, bits).unwrap();
        run(b, check, &matrix, format!("{bits:?}, every byte"));
    }
}

/// The bits of the host's own, whatever the storage type.
fn run<B: Backend>(b: &B, check: &mut Check, matrix: &QuantisedMatrix, label: String) {
    let (rows, cols) = (matrix.rows, matrix.cols);
    let codes = Buf::<B, i8>::host(b, &matrix.codes);
    let scales = Buf::<B, f16>::host(b, &matrix.scales);
    let mut out = Act::<B>::blank(b, rows * cols);
    check.run(b, "dequantise", label, &[&codes, &scales], || {
        let out = &mut out.device;
        b.dequantise(out, &codes.device, &scales.device, matrix.bits, rows, cols)
    });
    let mut expected = out.before().to_vec();
    for (out, weight) in expected.iter_mut().zip(matrix.dequantised()) {
        *out = B::Element::from_f32(weight.to_f32());
    }
    check.expect_bits(&out.after(b), &expected);
}
