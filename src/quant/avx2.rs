//! Rows of weights to codes, eight values at a time: a model is quantised while it is loaded. Nothing here
//! depends on the order of values, so that the codes are those of the plain loops.

use std::arch::x86_64::*;

use half::f16;

/// Whether the processor has what [`codes_of`] and [`largest_magnitude`] need.
pub(super) fn is_there() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
}

/// The bits of the largest half, signs apart.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn largest_magnitude(weights: &[f16]) -> u16 {
    let magnitudes = weights.iter().map(|weight| weight.to_bits() & 0x7fff);
    magnitudes.fold(0, u16::max)
}

/// The codes of as many weights as a multiple of eight, and how many these are.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn codes_of(codes: &mut [i8], weights: &[f16], scale: f32, largest: f32) -> usize {
    let (weights, _) = weights.as_chunks::<8>();
    let (codes, _) = codes.as_chunks_mut::<8>();
    let (scale, most) = (_mm256_set1_ps(scale), _mm256_set1_ps(largest));
    let least = _mm256_set1_ps(-largest - 1.0);
    for (codes, weights) in codes.iter_mut().zip(weights) {
        // SAFETY: eight halves are the 16 bytes that are loaded, from any address.
        let halves = unsafe { _mm_loadu_si128(weights.as_ptr().cast()) };
        let quotient = _mm256_div_ps(_mm256_cvtph_ps(halves), scale);
        let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(quotient);
        let within = _mm256_min_ps(_mm256_max_ps(_mm256_cvtph_ps(rounded), least), most);
        // To the nearest whole number, ties to even.
        let whole = _mm256_cvtps_epi32(within);
        let (low, high) = (
            _mm256_castsi256_si128(whole),
            _mm256_extracti128_si256::<1>(whole),
        );
        let words = _mm_packs_epi32(low, high);
        let bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
        *codes = bytes.to_le_bytes().map(u8::cast_signed);
    }
    weights.len() * 8
}
