//! Made-up weights and codes: the bits of the host's own words, whatever the backend.

use half::f16;
use mp_train::backend::{Backend, Element};
use mp_train::quant::{Bits, pack};
use mp_train::random::{Domain, Key, NEAR_NORMAL_DEVIATION, near_normal};

use crate::buffer::Buf;
use crate::check::Check;

/// Around the widths of a draw (4), of a thread's piece (8) and of what a block of the host's makes (64,
/// 256); more than a thread block makes at a time (2,048), and than a piece of the host's threads.
const SIZES: [usize; 16] = [
    1, 2, 3, 4, 5, 8, 11, 63, 65, 97, 255, 257, 2_048, 2_055, 16_387, 40_001,
];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    for (index, len) in SIZES.into_iter().enumerate() {
        let key = Key::new(17, Domain::ModelInit).fold(index as u64);
        let deviation = [0.02, 1.0, 3e-6][index % 3];
        weights::<B, B::Element>(b, check, len, key, deviation);
        weights::<B, f32>(b, check, len, key, deviation);
        codes(b, check, len, key, Bits::Eight);
        codes(b, check, len, key, Bits::Four);
    }
}

fn numbers(key: Key, len: usize) -> Vec<i32> {
    let mut stream = key.stream();
    (0..len).map(|_| near_normal(stream.next_word())).collect()
}

fn weights<B: Backend, T: Element>(b: &B, check: &mut Check, len: usize, key: Key, deviation: f32) {
    let label = format!("{len} values of {}, deviation {deviation}", T::NAME);
    let mut out = Buf::<B, T>::blank(b, len);
    check.run(b, "synthetic", label, &[], || {
        b.synthetic(&mut out.device, len, key, deviation)
    });
    let factor = deviation / NEAR_NORMAL_DEVIATION;
    let mut expected = out.before().to_vec();
    for (out, number) in expected.iter_mut().zip(numbers(key, len)) {
        *out = T::from_f32(f16::from_f32(number as f32 * factor).to_f32());
    }
    check.expect_bits(&out.after(b), &expected);
}

fn codes<B: Backend>(b: &B, check: &mut Check, len: usize, key: Key, bits: Bits) {
    let label = format!("{len} bytes of {bits:?}");
    let mut out = Buf::<B, i8>::blank(b, len);
    check.run(b, "synthetic_codes", label, &[], || {
        b.synthetic_codes(&mut out.device, len, key, bits)
    });
    let count = match bits {
        Bits::Eight => len,
        Bits::Four => 2 * len,
    };
    let numbers = numbers(key, count);
    let codes: Vec<i8> = numbers.iter().map(|&n| bits.code_of(n)).collect();
    let mut expected = out.before().to_vec();
    pack(&mut expected[..len], &codes, bits);
    check.expect_bits(&out.after(b), &expected);
}
