// Counter-based random numbers, bit for bit those of src/random.rs (Philox4x32-10, Salmon et al.
// 2011), and the dropout masks made from them.
#pragma once
#include "common.cuh"

struct RandomKey {
    u32 low, high;
};

DEVICE uint4 philox(uint4 counter, RandomKey key) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u64 first = (u64)counter.x * 0xD2511F53u, second = (u64)counter.z * 0xCD9E8D57u;
        counter = make_uint4((u32)(second >> 32) ^ counter.y ^ key.low, (u32)second,
                             (u32)(first >> 32) ^ counter.w ^ key.high, (u32)first);
        key.low += 0x9E3779B9u;
        key.high += 0xBB67AE85u;
    }
    return counter;
}

// `Key::fold`: the key one coordinate further.
DEVICE RandomKey fold(RandomKey key, u64 coordinate) {
    const uint4 words = philox(make_uint4((u32)coordinate, (u32)(coordinate >> 32), 0u, 1u), key);
    RandomKey next;
    next.low = words.x;
    next.high = words.y;
    return next;
}

// `Key::words`: four words for one place of a two-dimensional array.
DEVICE uint4 random_words(RandomKey key, u32 row, u64 column) {
    return philox(make_uint4((u32)column, (u32)(column >> 32), row, 0u), key);
}

// `random::near_normal`: the bytes of a word added up, less their mean.
#define NEAR_NORMAL_LARGEST 510
DEVICE int near_normal(u32 word) {
    const u32 pairs = (word & 0x00ff00ffu) + (word >> 8 & 0x00ff00ffu);
    return (int)((pairs & 0xffffu) + (pairs >> 16)) - NEAR_NORMAL_LARGEST;
}

// `random::uniform`: in [0, 1), exact.
DEVICE float uniform(u32 word) { return (float)(word >> 8) * (1.0f / 16777216.0f); }
