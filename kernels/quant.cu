// Weights from codes: out[o, i] = code[o, i] * scales[o], rounded to half; the product is exact in
// float (8 by 11 bits). out [O, I], scales [O]. Grid O, a block per row, whose threads stride over
// the columns. Bound by memory, by the 2 bytes written per weight above all.
#include "pieces.cuh"

// The signed field of `bits` bits that ends below bit `end` of a word.
DEVICE float field(u32 word, u32 end, u32 bits) {
    return (float)((int)(word << (32 - end)) >> (32 - bits));
}

// Codes [O, I], a byte each; 8 at a time where I is a multiple of 8.
KERNEL __launch_bounds__(256) dequantise_int8(
    half* out, const i8* codes, const half* scales, u32 cols) {
    const u64 row = blockIdx.x;
    const float scale = to_float(scales[row]);
    out += row * cols;
    codes += row * cols;
    if (cols % 8 == 0) {
        for (u64 col = threadIdx.x * 8; col < cols; col += blockDim.x * 8) {
            const uint2 words = *reinterpret_cast<const uint2*>(codes + col);
            float weight[8];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                weight[i] = field(words.x, 8 * i + 8, 8) * scale;
                weight[4 + i] = field(words.y, 8 * i + 8, 8) * scale;
            }
            store(out + col, weight);
        }
    } else {
        for (u64 col = threadIdx.x; col < cols; col += blockDim.x) {
            out[col] = to_half((float)codes[col] * scale);
        }
    }
}

// Codes [O, I / 2], two to a byte, the even column in its high half; 8 at a time where I is a
// multiple of 8. I is even.
KERNEL __launch_bounds__(256) dequantise_int4(
    half* out, const i8* codes, const half* scales, u32 cols) {
    const u64 row = blockIdx.x;
    const float scale = to_float(scales[row]);
    out += row * cols;
    codes += row * (cols / 2);
    if (cols % 8 == 0) {
        for (u64 col = threadIdx.x * 8; col < cols; col += blockDim.x * 8) {
            const u32 word = *reinterpret_cast<const u32*>(codes + col / 2);
            float weight[8];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                weight[2 * i] = field(word, 8 * i + 8, 4) * scale;
                weight[2 * i + 1] = field(word, 8 * i + 4, 4) * scale;
            }
            store(out + col, weight);
        }
    } else {
        for (u64 pair = threadIdx.x; pair < cols / 2; pair += blockDim.x) {
            const u32 byte = (u8)codes[pair];
            const u32 weights = pack_half2(field(byte, 8, 4) * scale, field(byte, 4, 4) * scale);
            *reinterpret_cast<u32*>(out + 2 * pair) = weights;
        }
    }
}
