// Layer norm (CENTRED) and RMS norm, and their gradients. x is the residual sum in float; out, dx,
// weights and gradients that come in are half; everything between is float and rounded at the store.
#include "pieces.cuh"

// Threads that a block may have. A thread keeps 4 W values of its row, W = 4 where H is a multiple of 4
// and else 1; a row that fits so is read once, a longer one again for each step.
#define NORM_THREADS 512

// ---- rows to be normed: `take` gives a span the first time, `again` after that. Those of a residual sum
// are added up and written on the way, by the expressions of kernels/elementwise.cu.

struct GivenRow {
    const float* x;
    template <u32 W> METHOD void take(float (&v)[PIECES][W], u32 start, u32 cols) const {
        load_span(v, x, start, cols);
    }
    template <u32 W> METHOD void again(float (&v)[PIECES][W], u32 start, u32 cols) const {
        load_span(v, x, start, cols);
    }
};

// sum = alpha * x + branch, x half.
struct ScaledResidualRow {
    float* sum;
    const half* x;
    float alpha;
    const half* branch;
    template <u32 W> METHOD void take(float (&v)[PIECES][W], u32 start, u32 cols) const {
        float along[PIECES][W];
        load_span(v, branch, start, cols);
        load_span(along, x, start, cols);
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
#pragma unroll
            for (u32 i = 0; i < W; i++) v[p][i] += alpha * along[p][i];
        }
        store_span(sum, v, start, cols);
    }
    template <u32 W> METHOD void again(float (&v)[PIECES][W], u32 start, u32 cols) const {
        load_span(v, sum, start, cols);
    }
};

// sum = x + branch, x float.
struct ResidualRow {
    float* sum;
    const float* x;
    const half* branch;
    template <u32 W> METHOD void take(float (&v)[PIECES][W], u32 start, u32 cols) const {
        float along[PIECES][W];
        load_span(v, x, start, cols);
        load_span(along, branch, start, cols);
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
#pragma unroll
            for (u32 i = 0; i < W; i++) v[p][i] += along[p][i];
        }
        store_span(sum, v, start, cols);
    }
    template <u32 W> METHOD void again(float (&v)[PIECES][W], u32 start, u32 cols) const {
        load_span(v, sum, start, cols);
    }
};

// ---- forward
//
// out = (x - mean) * rstd * weight + bias per row, rstd = 1 / sqrt(var + eps), var around the mean;
// RMS norm: mean = 0, no bias, rstd = 1 / sqrt(mean(x²) + eps). out, x [T, H]; weight, bias [H];
// stats [2, T] means and rstds, or [T] rstds. Grid T, a block per row, H / (4 W) threads or more.
// Bound by memory: reads 4 bytes and writes 2 per value; with a residual sum reads 4 (RMS norm: 6) and
// writes 6, where a sum of its own and a norm read 8 (10) and write 6.
template <bool CENTRED, u32 W, class Row>
DEVICE void forward_row(
    half* out, float* stats, const Row& x, const half* weight, const half* bias, u32 rows,
    u32 cols, float eps) {
    __shared__ float room[32];
    const u32 row = blockIdx.x;
    out += (u64)row * cols;
    const bool held = cols <= span_width<W>();
    float v[PIECES][W];

    float sum = 0.0f;
    for (u32 start = 0; start < cols; start += span_width<W>()) {
        x.take(v, start, cols);
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
#pragma unroll
            for (u32 i = 0; i < W; i++) sum += CENTRED ? v[p][i] : v[p][i] * v[p][i];
        }
    }
    float mean = 0.0f;
    if constexpr (CENTRED) {
        mean = block_sum(sum, room) / (float)cols;
        sum = 0.0f;
        for (u32 start = 0; start < cols; start += span_width<W>()) {
            if (!held) x.again(v, start, cols);
#pragma unroll
            for (u32 p = 0; p < PIECES; p++) {
                if (piece_column<W>(start, p) >= cols) continue;
#pragma unroll
                for (u32 i = 0; i < W; i++) sum += (v[p][i] - mean) * (v[p][i] - mean);
            }
        }
    }
    const float rstd = 1.0f / sqrtf(block_sum(sum, room) / (float)cols + eps);
    if (threadIdx.x == 0) {
        if constexpr (CENTRED) {
            stats[row] = mean;
            stats[(u64)rows + row] = rstd;
        } else {
            stats[row] = rstd;
        }
    }
    for (u32 start = 0; start < cols; start += span_width<W>()) {
        if (!held) x.again(v, start, cols);
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
            const u32 col = piece_column<W>(start, p);
            if (col >= cols) continue;
            float factor[W], shift[W], y[W];
            load(factor, weight + col);
            if constexpr (CENTRED) load(shift, bias + col);
#pragma unroll
            for (u32 i = 0; i < W; i++) {
                y[i] = (v[p][i] - mean) * rstd * factor[i];
                if constexpr (CENTRED) y[i] += shift[i];
            }
            store(out + col, y);
        }
    }
}

template <bool CENTRED, class Row>
DEVICE void forward_any(
    half* out, float* stats, const Row& x, const half* weight, const half* bias, u32 rows,
    u32 cols, float eps) {
    if (cols % 4 == 0) {
        forward_row<CENTRED, 4>(out, stats, x, weight, bias, rows, cols, eps);
    } else {
        forward_row<CENTRED, 1>(out, stats, x, weight, bias, rows, cols, eps);
    }
}

KERNEL __launch_bounds__(NORM_THREADS) layer_norm(
    half* out, float* stats, const float* x, const half* weight, const half* bias, u32 rows,
    u32 cols, float eps) {
    const GivenRow row = {x + (u64)blockIdx.x * cols};
    forward_any<true>(out, stats, row, weight, bias, rows, cols, eps);
}

KERNEL __launch_bounds__(NORM_THREADS) rms_norm(
    half* out, float* stats, const float* x, const half* weight, u32 rows, u32 cols, float eps) {
    const GivenRow row = {x + (u64)blockIdx.x * cols};
    forward_any<false>(out, stats, row, weight, nullptr, rows, cols, eps);
}

KERNEL __launch_bounds__(NORM_THREADS) residual_layer_norm(
    half* out, float* stats, float* sum, const half* x, float alpha, const half* branch,
    const half* weight, const half* bias, u32 rows, u32 cols, float eps) {
    const u64 first = (u64)blockIdx.x * cols;
    const ScaledResidualRow row = {sum + first, x + first, alpha, branch + first};
    forward_any<true>(out, stats, row, weight, bias, rows, cols, eps);
}

KERNEL __launch_bounds__(NORM_THREADS) residual_rms_norm(
    half* out, float* stats, float* sum, const float* x, const half* branch, const half* weight,
    u32 rows, u32 cols, float eps) {
    const u64 first = (u64)blockIdx.x * cols;
    const ResidualRow row = {sum + first, x + first, branch + first};
    forward_any<false>(out, stats, row, weight, nullptr, rows, cols, eps);
}

// ---- gradient of the norm's output: dout + alpha * residual, where there is a residual. RMS norm has
// its residual in front of the norm, so there is none here.

struct RowGradient {
    const half* dout;
    const half* residual; // or null
    float alpha;
};

template <u32 W> DEVICE void load(float (&g)[W], const RowGradient& gradient, u64 place) {
    load(g, gradient.dout + place);
    if (gradient.residual != nullptr) {
        float along[W];
        load(along, gradient.residual + place);
#pragma unroll
        for (u32 i = 0; i < W; i++) g[i] += gradient.alpha * along[i];
    }
}

// ---- backward
//
// dx = rstd * (g - mean(g) - xhat * mean(g xhat)) per row, g = (dout + alpha * residual) * weight,
// xhat = (x - mean) * rstd; RMS norm: mean and mean(g) are 0, and `along` is added, the gradient of x
// where it is used beside the norm. dx, dout, residual, along, x [T, H]. Grid T, a block per row,
// H / (4 W) threads or more. Bound by memory: reads 8 bytes and writes 2 per value.
template <u32 W>
DEVICE void load_terms(
    float (&g)[PIECES][W], float (&xhat)[PIECES][W], const RowGradient& gradient,
    const float* x, const half* weight, u64 row, float mean, float rstd, u32 start, u32 cols) {
#pragma unroll
    for (u32 p = 0; p < PIECES; p++) {
        const u32 col = piece_column<W>(start, p);
        if (col < cols) {
            float factor[W];
            load(factor, weight + col);
            load(g[p], gradient, row * cols + col);
            load(xhat[p], x + row * cols + col);
#pragma unroll
            for (u32 i = 0; i < W; i++) {
                g[p][i] *= factor[i];
                xhat[p][i] = (xhat[p][i] - mean) * rstd;
            }
        } else {
#pragma unroll
            for (u32 i = 0; i < W; i++) g[p][i] = xhat[p][i] = 0.0f;
        }
    }
}

template <bool CENTRED, u32 W>
DEVICE void backward_row(
    half* dx, const RowGradient& gradient, const half* along, const float* x, const float* stats,
    const half* weight, u32 rows, u32 cols) {
    __shared__ float room[32];
    const u64 row = blockIdx.x;
    dx += row * cols;
    const float mean = CENTRED ? stats[row] : 0.0f;
    const float rstd = stats[CENTRED ? rows + row : row];
    const bool held = cols <= span_width<W>();
    float g[PIECES][W], xhat[PIECES][W];

    float g_sum = 0.0f, gx_sum = 0.0f;
    for (u32 start = 0; start < cols; start += span_width<W>()) {
        load_terms(g, xhat, gradient, x, weight, row, mean, rstd, start, cols);
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
#pragma unroll
            for (u32 i = 0; i < W; i++) {
                if constexpr (CENTRED) g_sum += g[p][i];
                gx_sum += g[p][i] * xhat[p][i];
            }
        }
    }
    const float g_mean = CENTRED ? block_sum(g_sum, room) / (float)cols : 0.0f;
    const float gx_mean = block_sum(gx_sum, room) / (float)cols;
    for (u32 start = 0; start < cols; start += span_width<W>()) {
        if (!held) load_terms(g, xhat, gradient, x, weight, row, mean, rstd, start, cols);
#pragma unroll
        for (u32 p = 0; p < PIECES; p++) {
            const u32 col = piece_column<W>(start, p);
            if (col >= cols) continue;
            float y[W];
            if (!CENTRED && along != nullptr) {
                load(y, along + row * cols + col);
            } else {
#pragma unroll
                for (u32 i = 0; i < W; i++) y[i] = 0.0f;
            }
#pragma unroll
            for (u32 i = 0; i < W; i++) y[i] += rstd * (g[p][i] - g_mean - xhat[p][i] * gx_mean);
            store(dx + col, y);
        }
    }
}

KERNEL __launch_bounds__(NORM_THREADS) layer_norm_backward(
    half* dx, const half* dout, const half* residual, float alpha, const float* x,
    const float* stats, const half* weight, u32 rows, u32 cols) {
    const RowGradient gradient = {dout, residual, alpha};
    if (cols % 4 == 0) {
        backward_row<true, 4>(dx, gradient, nullptr, x, stats, weight, rows, cols);
    } else {
        backward_row<true, 1>(dx, gradient, nullptr, x, stats, weight, rows, cols);
    }
}

KERNEL __launch_bounds__(NORM_THREADS) rms_norm_backward(
    half* dx, const half* dout, const half* residual, const float* x, const float* stats,
    const half* weight, u32 rows, u32 cols) {
    const RowGradient gradient = {dout, nullptr, 0.0f};
    if (cols % 4 == 0) {
        backward_row<false, 4>(dx, gradient, residual, x, stats, weight, rows, cols);
    } else {
        backward_row<false, 1>(dx, gradient, residual, x, stats, weight, rows, cols);
    }
}

// ---- gradient of weight and bias
//
// dweight[h] += sum over t of g[t, h] * xhat[t, h], dbias[h] += sum over t of g[t, h], in two
// launches: sums over chunks of rows, rows ascending; then the chunks, ascending.
//
// First: partial [chunks, 2, H] (RMS norm: [chunks, H]). Grid (ceil(H / (W * blockDim)), chunks), a
// thread has W columns of a chunk: W = 4, or 1 where H is no multiple of 4. Bound by memory: reads
// 8 bytes per value.
template <bool CENTRED, u32 W>
DEVICE void sum_chunk(
    float* partial, const RowGradient& gradient, const float* x, const float* stats, u32 rows,
    u32 cols, u32 rows_per_chunk) {
    const u64 col = grid_first() * W;
    if (col >= cols) return;
    const u64 first = (u64)blockIdx.y * rows_per_chunk;
    const u64 end = first + rows_per_chunk < rows ? first + rows_per_chunk : rows;
    float dweight[W] = {}, dbias[W] = {};
#pragma unroll 4
    for (u64 row = first; row < end; row++) {
        const float mean = CENTRED ? stats[row] : 0.0f;
        const float rstd = stats[CENTRED ? rows + row : row];
        float g[W], value[W];
        load(g, gradient, row * cols + col);
        load(value, x + row * cols + col);
#pragma unroll
        for (u32 i = 0; i < W; i++) {
            dweight[i] += g[i] * ((value[i] - mean) * rstd);
            dbias[i] += g[i];
        }
    }
    partial += (u64)blockIdx.y * (CENTRED ? 2 : 1) * cols + col;
    store(partial, dweight);
    if constexpr (CENTRED) store(partial + cols, dbias);
}

KERNEL __launch_bounds__(64) layer_norm_chunk_sums(
    float* partial, const half* dout, const half* residual, float alpha, const float* x,
    const float* stats, u32 rows, u32 cols, u32 rows_per_chunk) {
    const RowGradient gradient = {dout, residual, alpha};
    if (cols % 4 == 0) {
        sum_chunk<true, 4>(partial, gradient, x, stats, rows, cols, rows_per_chunk);
    } else {
        sum_chunk<true, 1>(partial, gradient, x, stats, rows, cols, rows_per_chunk);
    }
}

KERNEL __launch_bounds__(64) rms_norm_chunk_sums(
    float* partial, const half* dout, const float* x, const float* stats, u32 rows, u32 cols,
    u32 rows_per_chunk) {
    const RowGradient gradient = {dout, nullptr, 0.0f};
    if (cols % 4 == 0) {
        sum_chunk<false, 4>(partial, gradient, x, stats, rows, cols, rows_per_chunk);
    } else {
        sum_chunk<false, 1>(partial, gradient, x, stats, rows, cols, rows_per_chunk);
    }
}

// Second: sums[h] += partial[chunk, h], chunk ascending; `stride` values from chunk to chunk. Grid
// ceil(H / blockDim), a thread per column. Small beside the first.
KERNEL __launch_bounds__(128) add_chunks(
    float* sums, const float* partial, u32 chunks, u32 cols, u32 stride) {
    const u64 col = grid_first();
    if (col >= cols) return;
    float sum = sums[col];
#pragma unroll 8
    for (u64 chunk = 0; chunk < chunks; chunk++) sum += partial[chunk * stride + col];
    sums[col] = sum;
}
