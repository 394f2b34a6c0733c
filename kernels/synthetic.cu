// Made-up weights and codes, those of src/backend/cpu/synthetic.rs bit for bit: a whole number that is
// nearly normally distributed for each value, from one word of the counter-based generator; four values
// share a draw. Flat lists of `len` values (codes: bytes), any grid of at least 8 threads; a thread makes
// 8 at a time. Nothing is read. Bound by the ten rounds of Philox for four values (docs/kernel-floors.md:
// issue beside bytes), which a start can bear.
#include "pieces.cuh"
#include "random.cuh"

// Numbers first .. first + W - 1 of a key.
template <u32 W> DEVICE void numbers(int (&number)[W], RandomKey key, u64 first) {
    if constexpr (W == 1) {
        const uint4 words = random_words(key, 0, first / 4);
        const u32 place = (u32)(first % 4);
        number[0] = near_normal(place == 0 ? words.x : place == 1 ? words.y : place == 2 ? words.z : words.w);
    } else if constexpr (W == 2) {
        // An even number and the next are in one draw.
        const uint4 words = random_words(key, 0, first / 4);
        number[0] = near_normal(first % 4 == 0 ? words.x : words.z);
        number[1] = near_normal(first % 4 == 0 ? words.y : words.w);
    } else {
#pragma unroll
        for (u32 i = 0; i < W; i += 4) {
            const uint4 words = random_words(key, 0, (first + i) / 4);
            number[i] = near_normal(words.x);
            number[i + 1] = near_normal(words.y);
            number[i + 2] = near_normal(words.z);
            number[i + 3] = near_normal(words.w);
        }
    }
}

// out = factor * number, rounded to half whatever is stored; the product is rounded to float first, as
// nothing is added to it.
template <class T> struct Weights {
    T* out;
    RandomKey key;
    float factor;
    template <u32 W> METHOD void on(u64 at) const {
        int number[W];
        numbers(number, key, at);
        float value[W];
#pragma unroll
        for (u32 i = 0; i < W; i++) value[i] = to_float(to_half((float)number[i] * factor));
        store(out + at, value);
    }
};

KERNEL __launch_bounds__(256) synthetic_f16(half* out, u32 key_low, u32 key_high, float factor, u64 len) {
    in_pieces<8>(len, Weights<half>{out, {key_low, key_high}, factor});
}

KERNEL __launch_bounds__(256) synthetic_f32(float* out, u32 key_low, u32 key_high, float factor, u64 len) {
    in_pieces<8>(len, Weights<float>{out, {key_low, key_high}, factor});
}

// `Bits::code_of`: cut towards 0.
template <int LARGEST> DEVICE u32 code_of(int number) { return (u32)(number / (NEAR_NORMAL_LARGEST / LARGEST)); }

// Codes of 8 bits, one to a byte.
struct Int8 {
    i8* out;
    RandomKey key;
    template <u32 W> METHOD void on(u64 at) const {
        int number[W];
        numbers(number, key, at);
        if constexpr (W == 1) {
            out[at] = (i8)code_of<127>(number[0]);
        } else {
            u32 words[2] = {0u, 0u};
#pragma unroll
            for (u32 i = 0; i < 8; i++) words[i / 4] |= (code_of<127>(number[i]) & 0xffu) << 8 * (i % 4);
            *reinterpret_cast<uint2*>(out + at) = make_uint2(words[0], words[1]);
        }
    }
};

KERNEL __launch_bounds__(256) synthetic_int8(i8* out, u32 key_low, u32 key_high, u64 len) {
    in_pieces<8>(len, Int8{out, {key_low, key_high}});
}

// Codes of 4 bits, two to a byte, the even one in its high half.
struct Int4 {
    i8* out;
    RandomKey key;
    template <u32 W> METHOD void on(u64 at) const {
        int number[2 * W];
        numbers(number, key, 2 * at);
        u32 bytes[W];
#pragma unroll
        for (u32 i = 0; i < W; i++)
            bytes[i] = (code_of<7>(number[2 * i]) & 15u) << 4 | code_of<7>(number[2 * i + 1]) & 15u;
        if constexpr (W == 1) {
            out[at] = (i8)bytes[0];
        } else {
            u32 words[2] = {0u, 0u};
#pragma unroll
            for (u32 i = 0; i < 8; i++) words[i / 4] |= bytes[i] << 8 * (i % 4);
            *reinterpret_cast<uint2*>(out + at) = make_uint2(words[0], words[1]);
        }
    }
};

KERNEL __launch_bounds__(256) synthetic_int4(i8* out, u32 key_low, u32 key_high, u64 len) {
    in_pieces<8>(len, Int4{out, {key_low, key_high}});
}
