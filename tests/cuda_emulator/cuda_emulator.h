// Enough of the CUDA C++ device language for kernels/*.cu to be compiled by g++ and run on the CPU.
//
// Every CUDA thread is a fiber (scheduler.cpp); barriers, shuffles and tensor-core instructions are
// meetings of fibers. This header is what a kernel sees; the functions it declares live in the
// pretend libcuda.so, which loads the compiled kernels.
#pragma once

// The pretend compiler first looks for kernels in the preprocessed source: their marks stay then.
#if !defined(EMULATOR_SCAN)

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <math.h>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
// One block runs on one OS thread, so what is local to the OS thread is shared by the block. Address
// sanitizer does not see the ends of thread-local arrays: its builds use plain variables.
#if defined(EMULATOR_PLAIN_SHARED)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

// ---- vector types

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define EMULATOR_VECTOR2(type, name)                   \
    struct __align__(2 * sizeof(type)) name {          \
        type x, y;                                     \
    };                                                 \
    static inline name make_##name(type x, type y) {   \
        return {x, y};                                 \
    }
#define EMULATOR_VECTOR4(type, name, alignment)                        \
    struct __align__(alignment) name {                                 \
        type x, y, z, w;                                               \
    };                                                                 \
    static inline name make_##name(type x, type y, type z, type w) {   \
        return {x, y, z, w};                                           \
    }
EMULATOR_VECTOR2(signed char, char2)
EMULATOR_VECTOR2(unsigned char, uchar2)
EMULATOR_VECTOR2(short, short2)
EMULATOR_VECTOR2(unsigned short, ushort2)
EMULATOR_VECTOR2(int, int2)
EMULATOR_VECTOR2(unsigned, uint2)
EMULATOR_VECTOR2(float, float2)
EMULATOR_VECTOR2(double, double2)
EMULATOR_VECTOR2(long long, longlong2)
EMULATOR_VECTOR2(unsigned long long, ulonglong2)
EMULATOR_VECTOR4(signed char, char4, 4)
EMULATOR_VECTOR4(unsigned char, uchar4, 4)
EMULATOR_VECTOR4(short, short4, 8)
EMULATOR_VECTOR4(unsigned short, ushort4, 8)
EMULATOR_VECTOR4(int, int4, 16)
EMULATOR_VECTOR4(unsigned, uint4, 16)
EMULATOR_VECTOR4(float, float4, 16)
#undef EMULATOR_VECTOR2
#undef EMULATOR_VECTOR4

// ---- what the scheduler offers to kernels

namespace emulator {

// A place in a kernel source, for reports: as a default argument, that of the call.
struct Site {
    const char* file;
    int line;
    constexpr Site(const char* file = __builtin_FILE(), int line = __builtin_LINE()) : file(file), line(line) {}
};
#define EMULATOR_SITE emulator::Site site = emulator::Site()

struct Thread {
    uint3 index;
    unsigned lane;
};
struct Geometry {
    uint3 block, block_size, grid_size;
};
#pragma GCC visibility push(default)
// Of the CUDA thread that this OS thread runs just now.
#define EMULATOR_TLS __attribute__((tls_model("initial-exec")))
extern __thread Thread* current_thread EMULATOR_TLS;
extern __thread Geometry current_geometry EMULATOR_TLS;

void* dynamic_shared();
void sync_block(Site site);
void sync_warp(unsigned mask, Site site);
// The value that lane `source` of the warp brought.
uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, Site site);
unsigned ballot(unsigned mask, bool predicate, Site site);
// A point where another thread may come first in random order.
void preemption_point();
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, EMULATOR_SITE);
void mma_m16n8k8(float (&d)[4], unsigned a0, unsigned a1, unsigned b0, EMULATOR_SITE);
void ldmatrix_x4(unsigned (&r)[4], const void* row, bool transposed, EMULATOR_SITE);
void cp_async16(void* shared, const void* global, bool valid, EMULATOR_SITE);
void copy16(void* shared, const void* global, bool valid, EMULATOR_SITE);
void cp_async_commit();
void cp_async_wait(int groups_left);
#pragma GCC visibility pop

inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }
inline uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }

template <class To, class From> static inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
template <class T> static inline T shuffle_value(unsigned mask, T value, unsigned source, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    word = shuffle(mask, word, source, site);
    memcpy(&value, &word, sizeof value);
    return value;
}
// Maximum and minimum as the device takes them: a NaN loses.
static inline float max_float(float a, float b) { return a > b || b != b ? a : b; }
static inline float min_float(float a, float b) { return a < b || b != b ? a : b; }

#if defined(__SANITIZE_THREAD__)
}  // namespace emulator
#include <sys/mman.h>
namespace emulator {
// Maps the pages of a range anew with what they hold: the race detector then knows of no access to
// them. It heeds the call only from code that it has instrumented, which is why this is not elsewhere.
__attribute__((no_sanitize("thread"))) static inline void forget_accesses(char* start, char* stop) {
    char* first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(start) & ~uintptr_t(4095));
    const size_t bytes = (size_t)(stop - first + 4095) & ~size_t(4095);
    volatile char* copy = static_cast<char*>(__builtin_alloca(bytes));
    for (size_t i = 0; i < bytes; i++) copy[i] = first[i];
    mmap(first, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    for (size_t i = 0; i < bytes; i++) first[i] = copy[i];
}
#endif

// ---- how a kernel is called: the table that fake NVRTC appends to a source

struct Argument {
    unsigned bytes;
    bool pointer;
};
struct Kernel {
    const char* name;
    void (*call)(void** arguments);
    const Argument* arguments;
    unsigned argument_count;
    unsigned max_threads;  // of __launch_bounds__, 0 without
};
// The first value of __launch_bounds__.
constexpr unsigned launch_bound() { return 0; }
template <class... Rest> constexpr unsigned launch_bound(unsigned threads, Rest...) { return threads; }
template <auto F> struct Entry;
template <class... A, void (*F)(A...)> struct Entry<F> {
    template <size_t... I> static void apply(void** a, std::index_sequence<I...>) {
        (void)a;
        F(*static_cast<std::remove_reference_t<A>*>(a[I])...);
    }
    static void call(void** arguments) { apply(arguments, std::index_sequence_for<A...>{}); }
    static constexpr unsigned count = sizeof...(A);
    static constexpr Argument arguments[sizeof...(A) + 1] = {Argument{sizeof(A), std::is_pointer_v<A>}..., {}};
};

}  // namespace emulator

#define threadIdx (emulator::current_thread->index)
#define blockIdx (emulator::current_geometry.block)
#define blockDim (emulator::current_geometry.block_size)
#define gridDim (emulator::current_geometry.grid_size)
#define warpSize 32

// ---- barriers, shuffles, votes

static inline void __syncthreads(EMULATOR_SITE) { emulator::sync_block(site); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) { emulator::sync_warp(mask, site); }

template <class T> static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
    const unsigned lane = emulator::current_thread->lane;
    return emulator::shuffle_value(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EMULATOR_SITE) {
    const unsigned lane = emulator::current_thread->lane, source = lane ^ bits;
    return emulator::shuffle_value(mask, value, source / width == lane / width ? source : lane, site);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
    const unsigned lane = emulator::current_thread->lane, source = lane + delta;
    return emulator::shuffle_value(mask, value, source / width == lane / width ? source : lane, site);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
    const unsigned lane = emulator::current_thread->lane, source = lane - delta;
    return emulator::shuffle_value(mask, value, delta <= lane % width ? source : lane, site);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return emulator::ballot(mask, predicate != 0, site);
}
static inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return emulator::ballot(mask, predicate != 0, site) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
    return emulator::ballot(mask, predicate != 0, site) == mask;
}
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] static inline void __trap() { emulator::fail("__trap()"); }

// ---- atomics

#define EMULATOR_ATOMICS(T)                                                                              \
    static inline T atomicAdd(T* p, T value) {                                                           \
        emulator::preemption_point();                                                                    \
        return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);                                           \
    }                                                                                                    \
    static inline T atomicExch(T* p, T value) {                                                          \
        emulator::preemption_point();                                                                    \
        return __atomic_exchange_n(p, value, __ATOMIC_RELAXED);                                          \
    }                                                                                                    \
    static inline T atomicCAS(T* p, T expected, T value) {                                               \
        emulator::preemption_point();                                                                    \
        __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);     \
        return expected;                                                                                 \
    }                                                                                                    \
    static inline T atomicOr(T* p, T value) {                                                            \
        emulator::preemption_point();                                                                    \
        return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);                                            \
    }                                                                                                    \
    static inline T atomicAnd(T* p, T value) {                                                           \
        emulator::preemption_point();                                                                    \
        return __atomic_fetch_and(p, value, __ATOMIC_RELAXED);                                           \
    }                                                                                                    \
    static inline T atomicMax(T* p, T value) {                                                           \
        emulator::preemption_point();                                                                    \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                    \
        while (old < value &&                                                                            \
               !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
        }                                                                                                \
        return old;                                                                                      \
    }                                                                                                    \
    static inline T atomicMin(T* p, T value) {                                                           \
        emulator::preemption_point();                                                                    \
        T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                    \
        while (value < old &&                                                                            \
               !__atomic_compare_exchange_n(p, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
        }                                                                                                \
        return old;                                                                                      \
    }
EMULATOR_ATOMICS(int)
EMULATOR_ATOMICS(unsigned)
EMULATOR_ATOMICS(unsigned long long)
#undef EMULATOR_ATOMICS
static inline float atomicAdd(float* p, float value) {
    emulator::preemption_point();
    unsigned* word = reinterpret_cast<unsigned*>(p);
    unsigned old = __atomic_load_n(word, __ATOMIC_RELAXED), sum;
    do {
        sum = emulator::bit_cast<unsigned>(emulator::bit_cast<float>(old) + value);
    } while (!__atomic_compare_exchange_n(word, &old, sum, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return emulator::bit_cast<float>(old);
}

// ---- integer and bit functions

#define EMULATOR_MINMAX(R, A, B)                                          \
    static inline R min(A a, B b) { return (R)a < (R)b ? (R)a : (R)b; }   \
    static inline R max(A a, B b) { return (R)a > (R)b ? (R)a : (R)b; }
EMULATOR_MINMAX(int, int, int)
EMULATOR_MINMAX(unsigned, unsigned, unsigned)
EMULATOR_MINMAX(unsigned, int, unsigned)
EMULATOR_MINMAX(unsigned, unsigned, int)
EMULATOR_MINMAX(long, long, long)
EMULATOR_MINMAX(unsigned long, unsigned long, unsigned long)
EMULATOR_MINMAX(long long, long long, long long)
EMULATOR_MINMAX(unsigned long long, unsigned long long, unsigned long long)
EMULATOR_MINMAX(unsigned long long, long long, unsigned long long)
EMULATOR_MINMAX(unsigned long long, unsigned long long, long long)
EMULATOR_MINMAX(double, double, double)
#undef EMULATOR_MINMAX
static inline float min(float a, float b) { return emulator::min_float(a, b); }
static inline float max(float a, float b) { return emulator::max_float(a, b); }

template <class T> static inline T __ldg(const T* p) { return *p; }
template <class T> static inline T __ldcs(const T* p) { return *p; }
template <class T> static inline T __ldcg(const T* p) { return *p; }
template <class T> static inline void __stcs(T* p, T value) { *p = value; }
template <class T> static inline void __stcg(T* p, T value) { *p = value; }
static inline float __int_as_float(int x) { return emulator::bit_cast<float>(x); }
static inline float __uint_as_float(unsigned x) { return emulator::bit_cast<float>(x); }
static inline int __float_as_int(float x) { return emulator::bit_cast<int>(x); }
static inline unsigned __float_as_uint(float x) { return emulator::bit_cast<unsigned>(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) << (shift & 31) >> 32);
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (shift & 31));
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; i++) {
        const unsigned which = selector >> 4 * i & 15;
        unsigned byte = (unsigned)(bytes >> 8 * (which & 7)) & 255;
        if (which & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// ---- float functions
//
// The fast approximations are computed exactly here: results on a GPU differ in their last bits.
// glibc declares some of these names itself, so they are macros.

#define fmaxf(a, b) emulator::max_float(a, b)
#define fminf(a, b) emulator::min_float(a, b)
#define __expf(x) expf(x)
#define __exp10f(x) exp10f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
#define __builtin_assume(x) ((void)0)
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) {
    volatile float product = a * b;  // keeps the compiler from fusing it into a sum
    return product;
}
static inline float __fadd_rn(float a, float b) {
    volatile float x = a, y = b;
    return x + y;
}
static inline float __saturatef(float x) { return emulator::min_float(emulator::max_float(x, 0.0f), 1.0f); }
static inline int __float2int_rn(float x) { return (int)lrintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline int __float2int_ru(float x) { return (int)ceilf(x); }
static inline unsigned __float2uint_rn(float x) { return (unsigned)lrintf(x); }
static inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }

#endif
