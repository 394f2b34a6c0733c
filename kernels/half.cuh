// IEEE half precision without cuda_fp16.h: storage and conversion only, arithmetic is done in float.
#pragma once

#if defined(MP_TRAIN_EMULATION)

struct half {
    u16 bits;
};
DEVICE float to_float(half x) { return emulator::half_to_float(x.bits); }
// Rounds to nearest, ties to even.
DEVICE half to_half(float x) { return half{emulator::float_to_half(x)}; }
DEVICE u32 pack_half2(float low, float high) {
    return (u32)to_half(low).bits | (u32)to_half(high).bits << 16;
}
DEVICE void unpack_half2(float& low, float& high, u32 pair) {
    low = to_float(half{(u16)pair});
    high = to_float(half{(u16)(pair >> 16)});
}

#else

struct __align__(2) half {
    u16 bits;
};
DEVICE float to_float(half x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
// Rounds to nearest, ties to even.
DEVICE half to_half(float x) {
    half y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}
DEVICE u32 pack_half2(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return (u32)to_half(low).bits | (u32)to_half(high).bits << 16;
#endif
}
DEVICE void unpack_half2(float& low, float& high, u32 pair) {
    half a, b;
    a.bits = (u16)pair;
    b.bits = (u16)(pair >> 16);
    low = to_float(a);
    high = to_float(b);
}

#endif
