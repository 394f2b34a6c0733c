// What every kernel starts from: the half type, vector access, reductions.
//
// No toolkit header is included: NVRTC compiles these sources from memory on a machine that has
// nothing but its library. Under MP_TRAIN_EMULATION the same sources are compiled by a C++ compiler
// and run on the CPU (tests/cuda_emulator); only this file, half.cuh and mma.cuh know the difference.
//
// Conventions of all kernels: outputs come first; the element type of weights and activations is
// `half`, of residual sums, statistics and gradients of trainables `float`, of ids `u32`; sums are
// taken in float in an order that the shape alone decides; no float atomics.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#if defined(MP_TRAIN_EMULATION)
#include "cuda_emulator.h"
#define DEVICE static inline
// Dynamic shared memory of the block, 16-byte aligned, as an array of T.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::dynamic_shared())
#else
#define DEVICE static __device__ __forceinline__
#define DYNAMIC_SHARED(T, name)                                         \
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes_[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared_bytes_)
#endif

#define KERNEL extern "C" __global__ void
#define FULL_WARP 0xffffffffu
#define INFINITE (__int_as_float(0x7f800000))

#include "half.cuh"

// ---- indices

DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

// First element of a grid-stride loop of this thread, and the step.
DEVICE u64 grid_first() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE u64 grid_step() { return (u64)gridDim.x * blockDim.x; }

// ---- vector access: 16 bytes at once; the address must be a multiple of 16

DEVICE bool aligned16(const void* p) { return ((u64)p & 15) == 0; }

DEVICE void load8(float (&out)[8], const half* p) {
    const uint4 raw = *reinterpret_cast<const uint4*>(p);
    unpack_half2(out[0], out[1], raw.x);
    unpack_half2(out[2], out[3], raw.y);
    unpack_half2(out[4], out[5], raw.z);
    unpack_half2(out[6], out[7], raw.w);
}

DEVICE void store8(half* p, const float (&x)[8]) {
    uint4 raw;
    raw.x = pack_half2(x[0], x[1]);
    raw.y = pack_half2(x[2], x[3]);
    raw.z = pack_half2(x[4], x[5]);
    raw.w = pack_half2(x[6], x[7]);
    *reinterpret_cast<uint4*>(p) = raw;
}

// ---- reductions, in a fixed order

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Sum over a block of whole warps, the same in every thread. `room` has a place for each warp; the
// call may be repeated with the same room.
DEVICE float block_sum(float x, float* room) {
    const u32 warps = blockDim.x >> 5;
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
    __syncthreads();
    float sum = 0.0f;
    for (u32 warp = 0; warp < warps; warp++) sum += room[warp];
    return sum;
}

DEVICE float block_max(float x, float* room) {
    const u32 warps = blockDim.x >> 5;
    x = warp_max(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
    __syncthreads();
    float top = room[0];
    for (u32 warp = 1; warp < warps; warp++) top = fmaxf(top, room[warp]);
    return top;
}
