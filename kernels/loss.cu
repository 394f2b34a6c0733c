// Softmax cross-entropy, fused with its gradient.
#include "common.cuh"

#define LOG2_E 1.4426950408889634f
// Below every finite half; unlike minus infinity it can be subtracted from itself.
#define LOWEST (-3.0e38f)
#define LOSS_THREADS 512

// Running maximum of values seen, and the sum of exp(value - maximum) over them.
struct Softmax {
    float max, sum;
};

DEVICE float exp_of(float difference) { return exp2f(difference * LOG2_E); }

// A NaN is passed over by the maximum and kept by the sum.
template <int N> DEVICE void take(Softmax& seen, const float (&x)[N]) {
    float max = seen.max;
#pragma unroll
    for (int i = 0; i < N; i++) max = fmaxf(max, x[i]);
    float sum = seen.sum * exp_of(seen.max - max);
#pragma unroll
    for (int i = 0; i < N; i++) sum += exp_of(x[i] - max);
    seen.max = max;
    seen.sum = sum;
}

// loss[first + i] = log(sum_v exp(x_v - max)) + max - x_id, then in place
// x_v = scale * (exp(x_v - max) / sum - [v == id]), with x = logits[i], id = ids[first + i].
//
// loss [..], logits [rows, V] half, ids [..].
// Precision: maximum, sum, loss and gradient in float; the gradient is rounded once, to half.
// Geometry: one block of 512 threads per row, gridDim.x = rows. Each thread keeps maximum and sum of
// its part in one pass and corrects the sum where the maximum grows; the second pass writes the
// gradient. 16 bytes at a time where V is a multiple of 8 (it is in all known models).
// Bound by memory: a row (261 KB at V = 130,528) is read twice and written once; it is more than
// shared memory holds on any card, the second read finds part of it in L2.
KERNEL __launch_bounds__(LOSS_THREADS)
cross_entropy(float* loss, half* logits, const u32* ids, u32 first, u32 vocab_size, float scale) {
    __shared__ float room[LOSS_THREADS / 32];
    half* row = logits + (u64)blockIdx.x * vocab_size;
    const u32 id = ids[first + blockIdx.x];
    const bool vector = vocab_size % 8 == 0;
    // An id outside of the vocabulary shows as a loss that is no number, not as a stray read.
    const float target = id < vocab_size ? to_float(row[id]) : __int_as_float(0x7fc00000);

    Softmax seen;
    seen.max = LOWEST;
    seen.sum = 0.0f;
    if (vector) {
        for (u32 v = 8 * threadIdx.x; v < vocab_size; v += 8 * LOSS_THREADS) {
            float x[8];
            load8(x, row + v);
            take(seen, x);
        }
    } else {
        for (u32 v = threadIdx.x; v < vocab_size; v += LOSS_THREADS) {
            const float x[1] = {to_float(row[v])};
            take(seen, x);
        }
    }
    const float max = block_max(seen.max, room);
    const float sum = block_sum(seen.sum * exp_of(seen.max - max), room);
    if (threadIdx.x == 0) loss[first + blockIdx.x] = logf(sum) + max - target;

    // Every thread has read its target before the barriers of block_sum, so the row may change.
    const float factor = scale / sum;
    if (vector) {
        for (u32 v = 8 * threadIdx.x; v < vocab_size; v += 8 * LOSS_THREADS) {
            float x[8];
            load8(x, row + v);
#pragma unroll
            for (u32 i = 0; i < 8; i++) x[i] = exp_of(x[i] - max) * factor - (v + i == id ? scale : 0.0f);
            store8(row + v, x);
        }
    } else {
        for (u32 v = threadIdx.x; v < vocab_size; v += LOSS_THREADS)
            row[v] = to_half(exp_of(to_float(row[v]) - max) * factor - (v == id ? scale : 0.0f));
    }
}
