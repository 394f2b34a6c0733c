// Rows moved by index: embedding and its gradient, gather, scatter; columns of rows.
//
// Grid: a block per row of the list, its threads stride over the columns, 16 bytes of the wider
// buffer each where rows are whole pieces. All are bound by memory.
#include "pieces.cuh"

// out = x for one row; the conversion, if any, is exact.
template <u32 W, class To, class From> DEVICE void copy_row(To* out, const From* x, u32 cols) {
    for (u64 col = (u64)threadIdx.x * W; col < cols; col += (u64)blockDim.x * W) {
        float v[W];
        load(v, x + col);
        store(out + col, v);
    }
}

// out[t] = table[ids[t]], widened. out [T, H] float, table [V, H], ids [T]. Grid T.
KERNEL __launch_bounds__(256) embed(float* out, const half* table, const u32* ids, u32 cols) {
    const u64 row = blockIdx.x, source = ids[row];
    if (cols % 4 == 0) {
        copy_row<4>(out + row * cols, table + source * cols, cols);
    } else {
        copy_row<1>(out + row * cols, table + source * cols, cols);
    }
}

// out[i] = x[index[i]]. out [rows, cols], float. Grid rows.
KERNEL __launch_bounds__(256) gather_rows(float* out, const float* x, const u32* index, u32 cols) {
    const u64 row = blockIdx.x, source = index[row];
    if (cols % 4 == 0) {
        copy_row<4>(out + row * cols, x + source * cols, cols);
    } else {
        copy_row<1>(out + row * cols, x + source * cols, cols);
    }
}

// out[index[i]] = x[i]. x [rows, cols], half. Grid rows; the indices differ.
KERNEL __launch_bounds__(256) scatter_rows(half* out, const half* x, const u32* index, u32 cols) {
    const u64 row = blockIdx.x, target = index[row];
    if (cols % 8 == 0) {
        copy_row<8>(out + target * cols, x + row * cols, cols);
    } else {
        copy_row<1>(out + target * cols, x + row * cols, cols);
    }
}

// out[t, out_first + c] = x[t, x_first + c] for c < cols. out [T, out_cols], x [T, x_cols], half. Grid T.
KERNEL __launch_bounds__(256) copy_columns(
    half* out, const half* x, u32 out_cols, u32 out_first, u32 x_cols, u32 x_first, u32 cols) {
    const u64 row = blockIdx.x;
    out += row * out_cols + out_first;
    x += row * x_cols + x_first;
    // Whether all of them are multiples of 8.
    if ((out_cols | out_first | x_cols | x_first | cols) % 8 == 0) {
        copy_row<8>(out, x, cols);
    } else {
        copy_row<1>(out, x, cols);
    }
}

// ---- gradient of the embedding
//
// dtable[ids[t]] += dout[t], t ascending. dtable [V, H] float, dout [T, H] half, ids [T]. Grid (T,
// ceil(H / (4 W * 256))), 256 threads, W = 4 where H is a multiple of 4, else 1. The block of the first row with an id adds all rows that have
// it, one after the other, to the values it holds in registers; the blocks of later ones end at once.
// So no two blocks meet in a row of the table, and nothing is sorted. A block looks through all ids:
// T² / 256 comparisons per thread block in sum, less than the traffic of dout and dtable up to some
// 10,000 rows of 4,096.

#define EMBED_THREADS 256

// Whether an earlier row has the same id.
DEVICE bool is_repeated(const u32* ids, u32 row, float* room) {
    bool found = false;
    for (u32 i = threadIdx.x; i < row; i += EMBED_THREADS) found |= ids[i] == ids[row];
    return block_max(found ? 1.0f : 0.0f, room) != 0.0f;
}

template <u32 W>
DEVICE void add_rows(float* dtable, const half* dout, const u32* ids, u32 rows, u32 cols) {
    __shared__ u32 counts[EMBED_THREADS / 32];
    __shared__ u32 found[EMBED_THREADS];
    const u32 row = blockIdx.x, start = blockIdx.y * span_width<W>();
    const u32 warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const u32 id = ids[row];
    float* out = dtable + (u64)id * cols;
    float sum[PIECES][W];
    load_span(sum, out, start, cols);
    for (u32 base = row; base < rows; base += EMBED_THREADS) {
        // The rows among the next 256 that have the id, in order. Two barriers do for both lists: each
        // is read between the writing of the other and the one after.
        const u32 candidate = base + threadIdx.x;
        const bool same = candidate < rows && ids[candidate] == id;
        const u32 votes = __ballot_sync(FULL_WARP, same);
        if (lane == 0) counts[warp] = __popc(votes);
        __syncthreads();
        u32 place = __popc(votes & ((1u << lane) - 1)), count = 0;
        for (u32 i = 0; i < EMBED_THREADS / 32; i++) {
            if (i < warp) place += counts[i];
            count += counts[i];
        }
        if (same) found[place] = candidate;
        __syncthreads();
#pragma unroll 2
        for (u32 i = 0; i < count; i++) {
            float g[PIECES][W];
            load_span(g, dout + (u64)found[i] * cols, start, cols);
#pragma unroll
            for (u32 p = 0; p < PIECES; p++) {
#pragma unroll
                for (u32 j = 0; j < W; j++) sum[p][j] += g[p][j];
            }
        }
    }
    store_span(out, sum, start, cols);
}

KERNEL __launch_bounds__(EMBED_THREADS) embed_backward(
    float* dtable, const half* dout, const u32* ids, u32 rows, u32 cols) {
    __shared__ float room[EMBED_THREADS / 32];
    if (is_repeated(ids, blockIdx.x, room)) return;
    if (cols % 4 == 0) {
        add_rows<4>(dtable, dout, ids, rows, cols);
    } else {
        add_rows<1>(dtable, dout, ids, rows, cols);
    }
}
