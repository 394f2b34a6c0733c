// Tensor cores, their loads from shared memory, and asynchronous copies into it.
//
// Sources: PTX ISA, "Matrix fragments for mma.m16n8k8 / m16n8k16", "ldmatrix", "cp.async".
// sm_75 has mma.m16n8k8 only and no cp.async: a product over k = 16 is two of k = 8 there, and a
// copy happens at once.
#pragma once
#include "common.cuh"

#if defined(MP_TRAIN_EMULATION)

#if __CUDA_ARCH__ >= 800
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::mma_m16n8k16(d, a, b0, b1);
}
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
    emulator::cp_async16(shared, global, valid);
}
DEVICE void cp_async_commit() { emulator::cp_async_commit(); }
template <int N> DEVICE void cp_async_wait() { emulator::cp_async_wait(N); }
#else
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    emulator::mma_m16n8k8(d, a[0], a[1], b0);
    emulator::mma_m16n8k8(d, a[2], a[3], b1);
}
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
    emulator::copy16(shared, global, valid);
}
DEVICE void cp_async_commit() {}
template <int N> DEVICE void cp_async_wait() {}
#endif
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) { emulator::ldmatrix_x4(r, row, false); }
DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
    emulator::ldmatrix_x4(r, row, true);
}

#else

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// d [16, 8] += a [16, 16] b [16, 8], half products, float sums. Lane 4 g + t holds
// a: rows g and g + 8, columns 2 t, 2 t + 1 (a[0], a[1]) and 8 more (a[2], a[3]);
// b: rows 2 t, 2 t + 1 (b0) and 8 more (b1), column g; d: rows g (d[0], d[1]) and g + 8, columns
// 2 t, 2 t + 1.
DEVICE void mma_m16n8k16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Four 8 x 8 matrices of halves. Lanes 8 i .. 8 i + 7 give the addresses of the rows of matrix i (16
// bytes each, 16-byte aligned); lane 4 g + t gets row g, columns 2 t, 2 t + 1 of each, or with
// `transposed` rows 2 t, 2 t + 1, column g.
DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Copies 16 bytes into shared memory, or zeros when not `valid` (then `global` is not read but must
// be a mapped address). Done after cp_async_wait and a barrier.
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
                 : "memory");
#else
    uint4 value = make_uint4(0, 0, 0, 0);
    if (valid) value = *reinterpret_cast<const uint4*>(global);
    *reinterpret_cast<uint4*>(shared) = value;
#endif
}
// Closes the group of this thread's copies since the last commit.
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the last N groups of this thread have arrived.
template <int N> DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#endif
