// Dropout of activations and of prefixes. Masks are those of src/backend/cpu/dropout.rs, bit for bit:
// a group of four columns of one row shares a draw of four words, keyed by the sequence.
#include "random.cuh"
#include "spans.cuh"

#define DROPOUT_THREADS 256

struct Dropout {
    RandomKey key;
    float p;
    // 1 / (1 - p), divided once by the host.
    float keep;
};

// Masks of columns 4 quad .. 4 quad + 3: 0 or keep.
DEVICE void masks_of(float* mask, const Dropout& dropout, RandomKey sequence_key, u32 row, u32 quad) {
    const uint4 words = random_words(sequence_key, row, quad);
    mask[0] = uniform(words.x) < dropout.p ? 0.0f : dropout.keep;
    mask[1] = uniform(words.y) < dropout.p ? 0.0f : dropout.keep;
    mask[2] = uniform(words.z) < dropout.p ? 0.0f : dropout.keep;
    mask[3] = uniform(words.w) < dropout.p ? 0.0f : dropout.keep;
}

DEVICE Dropout dropout_of(u32 key_low, u32 key_high, float p, float keep) {
    Dropout dropout;
    dropout.key.low = key_low;
    dropout.key.high = key_high;
    dropout.p = p;
    dropout.keep = keep;
    return dropout;
}

// One row: out = mask * x, or out += mask * x.
template <bool ADD>
DEVICE void row_dropout(half* out, const half* x, const Dropout& dropout, RandomKey key, u32 row, u32 cols) {
    if (cols % 8 == 0) {
        for (u32 column = 8 * threadIdx.x; column < cols; column += 8 * DROPOUT_THREADS) {
            float mask[8], value[8], sum[8];
            load8(value, x + column);
            if (ADD) load8(sum, out + column);
            masks_of(mask, dropout, key, row, column / 4);
            masks_of(mask + 4, dropout, key, row, column / 4 + 1);
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = ADD ? sum[i] + mask[i] * value[i] : mask[i] * value[i];
            store8(out + column, value);
        }
        return;
    }
    for (u32 quad = threadIdx.x; 4 * quad < cols; quad += DROPOUT_THREADS) {
        float mask[4];
        masks_of(mask, dropout, key, row, quad);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 column = 4 * quad + i;
            if (column >= cols) break;
            const float value = mask[i] * to_float(x[column]);
            out[column] = to_half(ADD ? to_float(out[column]) + value : value);
        }
    }
}

// The row of a micro-batch that a block works on: which sequence, and which token of it.
template <bool ADD>
DEVICE void token_dropout(half* out, const half* x, const Span* spans, u32 sequences, u32 cols, const Dropout& dropout) {
    __shared__ RandomKey key;
    __shared__ u32 token;
    if (threadIdx.x == 0) {
        const u32 sequence = span_of_row(spans, sequences, blockIdx.x);
        token = blockIdx.x - spans[sequence].q_start;
        key = fold(dropout.key, sequence);
    }
    __syncthreads();
    const u64 start = (u64)blockIdx.x * cols;
    row_dropout<ADD>(out + start, x + start, dropout, key, token, cols);
}

// out = mask * x; mask 0 or keep.
//
// out, x [T, cols] half.
// Precision: product in float, rounded once.
// Geometry: one block of 256 threads per row, gridDim.x = T; one thread finds the sequence and derives
// its key for all. 16 bytes a thread at a time where cols is a multiple of 8.
// Bound by memory; ten rounds of Philox for four values come close behind.
KERNEL __launch_bounds__(DROPOUT_THREADS)
dropout(half* out, const half* x, const Span* spans, u32 sequences, u32 cols, u32 key_low, u32 key_high, float p,
        float keep) {
    token_dropout<false>(out, x, spans, sequences, cols, dropout_of(key_low, key_high, p, keep));
}

// dx += mask * dout, with the mask of `dropout`.
//
// dx, dout [T, cols] half. Precision, geometry and bound as `dropout`.
KERNEL __launch_bounds__(DROPOUT_THREADS)
dropout_backward(half* dx, const half* dout, const Span* spans, u32 sequences, u32 cols, u32 key_low, u32 key_high,
                 float p, float keep) {
    token_dropout<true>(dx, dout, spans, sequences, cols, dropout_of(key_low, key_high, p, keep));
}

// out[s, position] = mask * x[position], with a mask for each sequence.
//
// out [S, P, cols] half, x [P, cols] half; cols = 2 G D.
// Precision: product in float, rounded once.
// Geometry: one block of 256 threads per row of out, gridDim.x = S P.
// Bound by writing out; x stays in L2.
KERNEL __launch_bounds__(DROPOUT_THREADS)
prefix_dropout(half* out, const half* x, u32 prefix_len, u32 cols, u32 key_low, u32 key_high, float p, float keep) {
    __shared__ RandomKey key;
    const Dropout dropout = dropout_of(key_low, key_high, p, keep);
    const u32 position = blockIdx.x % prefix_len;
    if (threadIdx.x == 0) key = fold(dropout.key, blockIdx.x / prefix_len);
    __syncthreads();
    row_dropout<false>(out + (u64)blockIdx.x * cols, x + (u64)position * cols, dropout, key, position, cols);
}

// dx[position, c] += sum over s of mask * dout[s, position, c], sequences ascending. With p = 0 and
// keep = 1 every mask is 1: the gradient of one prefix that all sequences share.
//
// dx [P, cols] float, dout [S, P, cols] float.
// Precision: float.
// Geometry: one thread per four columns of a position, gridDim = (P, ceil(cols / 1024)), 256 threads;
// it goes through all sequences, so that no two threads meet in a sum. Keys of 64 sequences at a time
// are derived once per block.
// Bound by reading dout.
KERNEL __launch_bounds__(DROPOUT_THREADS)
prefix_gradient(float* dx, const float* dout, u32 sequences, u32 prefix_len, u32 cols, u32 key_low, u32 key_high,
                float p, float keep) {
    __shared__ RandomKey keys[64];
    const Dropout dropout = dropout_of(key_low, key_high, p, keep);
    const u32 position = blockIdx.x;
    const u32 quad = blockIdx.y * DROPOUT_THREADS + threadIdx.x;
    const u32 column = 4 * quad;
    const u32 count = column < cols ? (cols - column < 4 ? cols - column : 4) : 0;
    const bool vector = cols % 4 == 0 && count == 4;
    dx += (u64)position * cols + column;
    dout += (u64)position * cols + column;

    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (i < count) sum[i] = dx[i];
    for (u32 start = 0; start < sequences; start += 64) {
        const u32 here = sequences - start < 64 ? sequences - start : 64;
        __syncthreads();
        if (threadIdx.x < here) keys[threadIdx.x] = fold(dropout.key, start + threadIdx.x);
        __syncthreads();
        if (count == 0) continue;
        for (u32 i = 0; i < here; i++) {
            float mask[4] = {1.0f, 1.0f, 1.0f, 1.0f};
            if (p > 0.0f) masks_of(mask, dropout, keys[i], position, quad);
            const float* terms = dout + (u64)(start + i) * prefix_len * cols;
            if (vector) {
                const float4 four = *reinterpret_cast<const float4*>(terms);
                sum[0] += mask[0] * four.x;
                sum[1] += mask[1] * four.y;
                sum[2] += mask[2] * four.z;
                sum[3] += mask[3] * four.w;
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; j++)
                    if (j < count) sum[j] += mask[j] * terms[j];
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++)
        if (i < count) dx[i] = sum[i];
}
