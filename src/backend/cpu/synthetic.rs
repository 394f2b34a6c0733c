//! Made-up weights and codes, from counter-based random numbers.

use half::f16;
use multiversion::multiversion;

use super::threads::Threads;
use crate::backend::Element;
use crate::quant::{Bits, pack};
use crate::random::{Key, NEAR_NORMAL_DEVIATION, near_normal};

pub fn weights<E: Element>(threads: &Threads, out: &mut [E], key: Key, deviation: f32) {
    let factor = deviation / NEAR_NORMAL_DEVIATION;
    threads.pieces(out, |start, out| {
        weights_piece(out, key, start as u64 / 4, factor);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn weights_piece<E: Element>(out: &mut [E], key: Key, block: u64, factor: f32) {
    key.fill(
        block,
        out,
        #[inline(always)]
        |word| {
            let value = <f16 as Element>::from_f32(near_normal(word) as f32 * factor);
            E::from_f32(Element::to_f32(value))
        },
    );
}

/// Codes that are made before they are packed.
const BLOCK: usize = 256;

pub fn codes(threads: &Threads, out: &mut [i8], key: Key, bits: Bits) {
    let bytes = bits.row_bytes(BLOCK);
    let per_byte = BLOCK / bytes;
    threads.pieces(out, |start, out| {
        let mut codes = [0; BLOCK];
        for (index, out) in out.chunks_mut(bytes).enumerate() {
            let first = (start + index * bytes) * per_byte;
            let codes = &mut codes[..out.len() * per_byte];
            codes_block(codes, key, first as u64 / 4, bits);
            pack(out, codes, bits);
        }
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn codes_block(codes: &mut [i8], key: Key, block: u64, bits: Bits) {
    key.fill(
        block,
        codes,
        #[inline(always)]
        |word| bits.code_of(near_normal(word)),
    );
}
