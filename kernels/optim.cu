// Sums over tensors and AdamW. Tensors are cut into pieces of PIECE values, one block each; the tables
// of tensors and pieces are made by src/backend/cuda/optim.rs and stay on the device.
#include "common.cuh"

#define PIECE 8192
#define OPTIM_THREADS 256

// What a block works on: piece `piece` of tensor `tensor` of a table.
struct Piece {
    u32 tensor, piece;
};

struct SquaresTerm {
    const float* x;
    u64 len;
    // Place of the sum, and of the first piece's part of it.
    u32 index, first_piece;
};

struct AdamwTensor {
    half* working;
    float* master;
    float* exp_avg;
    float* exp_avg_sq;
    const float* gradient;
    u64 len;
    float weight_decay;
    u32 unused;
};

DEVICE float same(float x) { return x; }
DEVICE float square(float x) { return x * x; }

// Sum of TERM(x[i]) over i < count, the same in every thread; x is 16-byte aligned. Each thread adds
// every 256th group of four values, the groups' sums meet in block_sum: the order is fixed by count.
template <float (*TERM)(float)> DEVICE float sum_of(const float* x, u64 count) {
    __shared__ float room[OPTIM_THREADS / 32];
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (u64 i = 4 * threadIdx.x; i < count; i += 4 * OPTIM_THREADS) {
        if (i + 4 <= count) {
            const float4 four = *reinterpret_cast<const float4*>(x + i);
            sum[0] += TERM(four.x);
            sum[1] += TERM(four.y);
            sum[2] += TERM(four.z);
            sum[3] += TERM(four.w);
        } else {
            for (u64 j = i; j < count; j++) sum[0] += TERM(x[j]);
        }
    }
    return block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]), room);
}

DEVICE u64 piece_len(u64 len, u64 start) { return len - start < PIECE ? len - start : PIECE; }

// out[index] = sum of x[i] over i < len.
//
// Precision: float. Geometry: one block of 256 threads. Meant for the losses of a micro-batch and for
// the parts of a longer sum; bound by latency.
KERNEL __launch_bounds__(OPTIM_THREADS) sum(float* out, const float* x, u64 len, u32 index) {
    const float total = sum_of<same>(x, len);
    if (threadIdx.x == 0) out[index] = total;
}

// partials[k] = sum of piece k of x, for sums longer than a piece.
//
// Precision: float. Geometry: one block of 256 threads per piece. Bound by reading x.
KERNEL __launch_bounds__(OPTIM_THREADS) sum_pieces(float* partials, const float* x, u64 len) {
    const u64 start = (u64)blockIdx.x * PIECE;
    const float total = sum_of<same>(x + start, piece_len(len, start));
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// partials[b] = sum of x² over the piece that block b works on, for all tensors of the table at once.
//
// Precision: float. Geometry: one block of 256 threads per piece. Bound by reading the tensors.
KERNEL __launch_bounds__(OPTIM_THREADS)
square_pieces(float* partials, const SquaresTerm* terms, const Piece* pieces) {
    const Piece piece = pieces[blockIdx.x];
    const SquaresTerm term = terms[piece.tensor];
    const u64 start = (u64)piece.piece * PIECE;
    const float total = sum_of<square>(term.x + start, piece_len(term.len, start));
    if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// out[index] = scale² * (sum of x² over all pieces), for each tensor of the table.
//
// Precision: float. Geometry: one block of 256 threads per tensor; the order of a sum depends on the
// tensor's length alone. Bound by latency.
KERNEL __launch_bounds__(OPTIM_THREADS)
square_sums(float* out, const float* partials, const SquaresTerm* terms, float scale) {
    __shared__ float room[OPTIM_THREADS / 32];
    const SquaresTerm term = terms[blockIdx.x];
    const u64 pieces = (term.len + PIECE - 1) / PIECE;
    float sum = 0.0f;
    for (u64 i = threadIdx.x; i < pieces; i += OPTIM_THREADS) sum += partials[term.first_piece + i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) out[term.index] = scale * scale * sum;
}

struct AdamwStep {
    float learning_rate, beta1, beta2, eps, bias_correction1, bias_correction2, gradient_scale;
};

// One value; returns the new master value.
DEVICE float adamw_value(float master, float& m, float& v, float gradient, float decay, const AdamwStep& step) {
    const float g = step.gradient_scale * gradient;
    m = step.beta1 * m + (1.0f - step.beta1) * g;
    v = step.beta2 * v + (1.0f - step.beta2) * g * g;
    const float denominator = sqrtf(v / step.bias_correction2) + step.eps;
    return master * decay - step.learning_rate * (m / step.bias_correction1) / denominator;
}

// AdamW (Loshchilov & Hutter 2019) on all tensors of the table at once:
// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g², g = gradient_scale * gradient,
// master = master (1 - lr decay) - lr (m / c1) / (sqrt(v / c2) + eps), working = master.
//
// master, m = exp_avg, v = exp_avg_sq, gradient float, working half.
// Precision: float throughout, the working copy rounded once.
// Geometry: one block of 256 threads per piece, four values a thread at a time.
// Bound by memory: 16 bytes read and 14 written per value.
KERNEL __launch_bounds__(OPTIM_THREADS)
adamw(const AdamwTensor* tensors, const Piece* pieces, float learning_rate, float beta1, float beta2, float eps,
      float bias_correction1, float bias_correction2, float gradient_scale) {
    const AdamwStep step = {learning_rate, beta1, beta2, eps, bias_correction1, bias_correction2, gradient_scale};
    const Piece piece = pieces[blockIdx.x];
    const AdamwTensor tensor = tensors[piece.tensor];
    const u64 start = (u64)piece.piece * PIECE;
    const u64 end = start + piece_len(tensor.len, start);
    const float decay = 1.0f - step.learning_rate * tensor.weight_decay;
    for (u64 i = start + 4 * threadIdx.x; i < end; i += 4 * OPTIM_THREADS) {
        if (i + 4 <= end) {
            float4 master = *reinterpret_cast<const float4*>(tensor.master + i);
            float4 m = *reinterpret_cast<const float4*>(tensor.exp_avg + i);
            float4 v = *reinterpret_cast<const float4*>(tensor.exp_avg_sq + i);
            const float4 gradient = *reinterpret_cast<const float4*>(tensor.gradient + i);
            master.x = adamw_value(master.x, m.x, v.x, gradient.x, decay, step);
            master.y = adamw_value(master.y, m.y, v.y, gradient.y, decay, step);
            master.z = adamw_value(master.z, m.z, v.z, gradient.z, decay, step);
            master.w = adamw_value(master.w, m.w, v.w, gradient.w, decay, step);
            *reinterpret_cast<float4*>(tensor.master + i) = master;
            *reinterpret_cast<float4*>(tensor.exp_avg + i) = m;
            *reinterpret_cast<float4*>(tensor.exp_avg_sq + i) = v;
            *reinterpret_cast<uint2*>(tensor.working + i) =
                make_uint2(pack_half2(master.x, master.y), pack_half2(master.z, master.w));
        } else {
            for (u64 j = i; j < end; j++) {
                const float master = adamw_value(tensor.master[j], tensor.exp_avg[j], tensor.exp_avg_sq[j],
                                                 tensor.gradient[j], decay, step);
                tensor.master[j] = master;
                tensor.working[j] = to_half(master);
            }
        }
    }
}
