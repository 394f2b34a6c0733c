// W neighbouring values at once: one access of 16 bytes (float at W = 4, half at W = 8) where rows
// are whole pieces of W values, and buffers, as all of them do, start at a multiple of 16 bytes.
// W = 1 serves every other row.
#pragma once
#include "common.cuh"

template <u32 W> DEVICE void load(float (&x)[W], const float* p) {
    if constexpr (W == 1) {
        x[0] = *p;
    } else {
#pragma unroll
        for (u32 i = 0; i < W; i += 4) {
            const float4 raw = *reinterpret_cast<const float4*>(p + i);
            x[i] = raw.x;
            x[i + 1] = raw.y;
            x[i + 2] = raw.z;
            x[i + 3] = raw.w;
        }
    }
}

template <u32 W> DEVICE void load(float (&x)[W], const half* p) {
    if constexpr (W == 1) {
        x[0] = to_float(*p);
    } else if constexpr (W == 4) {
        const uint2 raw = *reinterpret_cast<const uint2*>(p);
        unpack_half2(x[0], x[1], raw.x);
        unpack_half2(x[2], x[3], raw.y);
    } else {
        load8(x, p);
    }
}

template <u32 W> DEVICE void store(float* p, const float (&x)[W]) {
    if constexpr (W == 1) {
        *p = x[0];
    } else {
#pragma unroll
        for (u32 i = 0; i < W; i += 4) {
            float4 raw;
            raw.x = x[i];
            raw.y = x[i + 1];
            raw.z = x[i + 2];
            raw.w = x[i + 3];
            *reinterpret_cast<float4*>(p + i) = raw;
        }
    }
}

template <u32 W> DEVICE void store(half* p, const float (&x)[W]) {
    if constexpr (W == 1) {
        *p = to_half(x[0]);
    } else if constexpr (W == 4) {
        uint2 raw;
        raw.x = pack_half2(x[0], x[1]);
        raw.y = pack_half2(x[2], x[3]);
        *reinterpret_cast<uint2*>(p) = raw;
    } else {
        store8(p, x);
    }
}

// ---- a span of a row in the registers of a block: PIECES pieces per thread

#define PIECES 4

// Columns from the start of one span to the next.
template <u32 W> DEVICE u32 span_width() { return PIECES * W * blockDim.x; }

// First column of piece p of this thread in the span that begins at `start`.
template <u32 W> DEVICE u32 piece_column(u32 start, u32 p) {
    return start + (p * blockDim.x + threadIdx.x) * W;
}

// The thread's values of a span; zeros beyond the end of the row.
template <u32 W, class T>
DEVICE void load_span(float (&x)[PIECES][W], const T* row, u32 start, u32 cols) {
#pragma unroll
    for (u32 p = 0; p < PIECES; p++) {
        const u32 col = piece_column<W>(start, p);
        if (col < cols) {
            load(x[p], row + col);
        } else {
#pragma unroll
            for (u32 i = 0; i < W; i++) x[p][i] = 0.0f;
        }
    }
}

template <u32 W, class T>
DEVICE void store_span(T* row, const float (&x)[PIECES][W], u32 start, u32 cols) {
#pragma unroll
    for (u32 p = 0; p < PIECES; p++) {
        const u32 col = piece_column<W>(start, p);
        if (col < cols) store(row + col, x[p]);
    }
}

// ---- a flat list

#if defined(MP_TRAIN_EMULATION)
#define METHOD inline
#else
#define METHOD __device__ __forceinline__
#endif

// Calls work.on<W>(i) for whole pieces of a list of `len` values and work.on<1>(i) for the values
// that are left, of which there are fewer than a block has threads.
template <u32 W, class Work> DEVICE void in_pieces(u64 len, const Work& work) {
    const u64 pieces = len / W;
    for (u64 piece = grid_first(); piece < pieces; piece += grid_step()) {
        work.template on<W>(piece * W);
    }
    const u64 rest = pieces * W + grid_first();
    if (rest < len) work.template on<1>(rest);
}
