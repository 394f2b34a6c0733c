// Each wrapper of mma.cuh by itself, for a test that knows what every lane must get.
#include "mma.cuh"

// d [16, 8] = a [16, 16] b [16, 8] + c [16, 8], all row-major; one warp.
KERNEL product(float* d, const half* a, const half* b, const float* c) {
    const u32 lane = threadIdx.x, g = lane >> 2, t = 2 * (lane & 3);
    u32 fragment[4];
    for (int i = 0; i < 4; i++) {
        const half* at = a + (g + (i & 1) * 8) * 16 + t + (i >> 1) * 8;
        fragment[i] = (u32)at[0].bits | (u32)at[1].bits << 16;
    }
    u32 column[2];
    for (int i = 0; i < 2; i++) {
        const half* at = b + (t + i * 8) * 8 + g;
        column[i] = (u32)at[0].bits | (u32)at[8].bits << 16;
    }
    float sum[4];
    for (int i = 0; i < 4; i++) sum[i] = c[(g + (i >> 1) * 8) * 8 + t + (i & 1)];
    mma_m16n8k16(sum, fragment, column[0], column[1]);
    for (int i = 0; i < 4; i++) d[(g + (i >> 1) * 8) * 8 + t + (i & 1)] = sum[i];
}

// out [2, 32, 4]: what each lane gets of four 8 x 8 matrices, plain and transposed; x [32, 8]: their
// rows, one after another.
KERNEL matrices(u32* out, const half* x) {
    __shared__ __align__(16) half room[32 * 8];
    const u32 lane = threadIdx.x;
    for (int i = 0; i < 8; i++) room[lane * 8 + i] = x[lane * 8 + i];
    __syncthreads();
    u32 plain[4], transposed[4];
    ldmatrix_x4(plain, room + lane * 8);
    ldmatrix_x4_transposed(transposed, room + lane * 8);
    for (int i = 0; i < 4; i++) {
        out[lane * 4 + i] = plain[i];
        out[128 + lane * 4 + i] = transposed[i];
    }
}

// out [64, 4]: two groups of copies of 16 bytes per lane, every third one of zeros instead; x [64, 4].
KERNEL copies(u32* out, const u32* x) {
    __shared__ __align__(16) u32 room[64 * 4];
    const u32 lane = threadIdx.x;
    for (u32 group = 0; group < 2; group++) {
        const u32 row = group * 32 + lane;
        cp_async16(room + row * 4, x + row * 4, row % 3 != 0);
        cp_async_commit();
    }
    cp_async_wait<1>();
    __syncthreads();
    // The lanes next to this one copied what it reads.
    const u32 other = (lane + 1) % 32;
    for (int i = 0; i < 4; i++) out[other * 4 + i] = room[other * 4 + i];
    cp_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < 4; i++) out[(32 + other) * 4 + i] = room[(32 + other) * 4 + i];
}

// out [4, n]: half to float and back, pairs packed and unpacked; x [n] floats.
KERNEL halves(float* out, const float* x, u32 n) {
    for (u32 i = threadIdx.x; i < n; i += blockDim.x) {
        out[i] = to_float(to_half(x[i]));
        float low, high;
        unpack_half2(low, high, pack_half2(x[i], -x[i]));
        out[n + i] = low;
        out[2 * n + i] = high;
        float eight[8], back[8];
        for (int j = 0; j < 8; j++) eight[j] = x[i] * (float)(j + 1);
        __align__(16) half stored[8];
        store8(stored, eight);
        load8(back, stored);
        out[3 * n + i] = back[7];
    }
}
