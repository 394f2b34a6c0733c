// Low-rank products (LoRA, Hu et al. 2021): matrix products where one side, `low`, has at most 64
// features and the other, `wide`, any number.
//
// Such products are bound by memory: each value of the wide side takes part in few products. So every
// lane loads 16 bytes of a wide row straight into the registers that the tensor cores read, without a
// stop in shared memory. That works because a sum does not mind in which order its terms come, nor a
// warp which of its columns is which: the k of a product, or the columns of a tile, are numbered so
// that eight neighbours in memory belong to one lane. The mapping stands at each kernel; g = lane / 4,
// t = lane % 4 as in mma.cuh.
#include "mma.cuh"

#define WARPS 8
#define ADAPTER_THREADS (32 * WARPS)

struct Lane {
    u32 warp, g, t;
};

DEVICE Lane lane_of_thread() {
    Lane lane;
    lane.warp = threadIdx.x >> 5;
    lane.g = (threadIdx.x & 31) >> 2;
    lane.t = threadIdx.x & 3;
    return lane;
}

// ---- halves of a row as bits, zeros from `columns` on; 0 columns for a row that is not there

DEVICE u32 bits_of(const half* row, u32 column, u32 columns) { return column < columns ? row[column].bits : 0; }

// Two; VECTOR where column is even, as are the lengths of all rows.
template <bool VECTOR> DEVICE u32 load_two(const half* row, u32 column, u32 columns) {
    if (VECTOR) return column < columns ? *reinterpret_cast<const u32*>(row + column) : 0;
    return bits_of(row, column, columns) | bits_of(row, column + 1, columns) << 16;
}

struct Eight {
    u32 word[4];
};

// Eight; VECTOR where column is a multiple of 8, as are the lengths of all rows.
template <bool VECTOR> DEVICE Eight load_eight(const half* row, u32 column, u32 columns) {
    Eight eight;
    if (VECTOR) {
        const uint4 raw =
            column < columns ? *reinterpret_cast<const uint4*>(row + column) : make_uint4(0, 0, 0, 0);
        eight.word[0] = raw.x;
        eight.word[1] = raw.y;
        eight.word[2] = raw.z;
        eight.word[3] = raw.w;
    } else {
#pragma unroll
        for (u32 i = 0; i < 4; i++) eight.word[i] = load_two<false>(row, column + 2 * i, columns);
    }
    return eight;
}

// Of two words the lower halves, or the upper ones, side by side.
DEVICE u32 pair_halves(u32 first, u32 second, bool upper) {
    return upper ? first >> 16 | (second & 0xffff0000u) : (first & 0xffffu) | second << 16;
}

// Warps add their parts of a tile in turn, which fixes the order and needs room for one tile only.
DEVICE void add_part(float& sum, float value, u32 turn) { sum = turn == 0 ? value : sum + value; }

// out = scale * x weightᵀ (+ out): sixteen rows of x per block, the sum over `wide` cut among the
// warps. TRANSPOSED: weight is [wide, low] instead of [low, wide].
//
// Lane (g, t) loads columns 8 t .. 8 t + 7 of a chunk of 32 from rows g and g + 8. Its words 0 and 1
// are k = 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of one product, words 2 and 3 those of the next.
template <int TILES, bool TRANSPOSED, bool VECTOR>
DEVICE void down_product(half* out, const half* __restrict__ x, const half* __restrict__ weight, u32 rows, u32 wide,
                         u32 low, float scale, u32 accumulate) {
    constexpr int PITCH = 8 * TILES + 1;
    constexpr int UNROLL = VECTOR && TILES < 4 ? 4 / TILES : 1;
    __shared__ float tile[16 * PITCH];
    const Lane lane = lane_of_thread();
    const u32 first = 16 * blockIdx.x, row = first + lane.g;
    const u32 above_columns = row < rows ? wide : 0, below_columns = row + 8 < rows ? wide : 0;
    const half* above_row = x + (u64)row * wide;
    const half* below_row = above_row + (u64)8 * wide;

    float d[TILES][4] = {};
#pragma unroll UNROLL
    for (u32 chunk = 32 * lane.warp; chunk < wide; chunk += 32 * WARPS) {
        const u32 column = chunk + 8 * lane.t;
        const Eight above = load_eight<VECTOR>(above_row, column, above_columns);
        const Eight below = load_eight<VECTOR>(below_row, column, below_columns);
        const u32 a[2][4] = {{above.word[0], below.word[0], above.word[1], below.word[1]},
                             {above.word[2], below.word[2], above.word[3], below.word[3]}};
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
            const u32 n = 8 * i + lane.g;
            Eight b;
            if (TRANSPOSED) {
                const u32 end = n < low ? wide : 0;
                const half* values = weight + (u64)column * low + n;
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const u32 k = column + 2 * j;
                    const u32 even = k < end ? values[2 * j * low].bits : 0;
                    const u32 odd = k + 1 < end ? values[(2 * j + 1) * low].bits : 0;
                    b.word[j] = even | odd << 16;
                }
            } else {
                b = load_eight<VECTOR>(weight + (u64)n * wide, column, n < low ? wide : 0);
            }
            mma_m16n8k16(d[i], a[0], b.word[0], b.word[1]);
            mma_m16n8k16(d[i], a[1], b.word[2], b.word[3]);
        }
    }

    for (u32 turn = 0; turn < WARPS; turn++) {
        if (lane.warp == turn) {
#pragma unroll
            for (u32 i = 0; i < TILES; i++)
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const u32 m = lane.g + 8 * (j / 2), n = 8 * i + 2 * lane.t + j % 2;
                    add_part(tile[m * PITCH + n], d[i][j], turn);
                }
        }
        __syncthreads();
    }
    const u32 count = (rows - first < 16 ? rows - first : 16) * low;
    out += (u64)first * low;
    for (u32 i = threadIdx.x; i < count; i += ADAPTER_THREADS) {
        const float value = scale * tile[i / low * PITCH + i % low];
        out[i] = to_half(accumulate ? value + to_float(out[i]) : value);
    }
}

// Eight values of a row of out, from `column` on.
template <bool VECTOR>
DEVICE void store_eight(half* row, u32 column, u32 columns, const float (&value)[8], float scale, u32 accumulate) {
    if (VECTOR) {
        if (column >= columns) return;
        float result[8] = {};
        if (accumulate) load8(result, row + column);
#pragma unroll
        for (u32 i = 0; i < 8; i++) result[i] += scale * value[i];
        store8(row + column, result);
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (column + i >= columns) break;
            const float before = accumulate ? to_float(row[column + i]) : 0.0f;
            row[column + i] = to_half(before + scale * value[i]);
        }
    }
}

// out = scale * x weightᵀ (+ out): 32 columns of out per warp, whose weights stay in registers while the
// warp goes through `block_rows` rows, sixteen at a time. TRANSPOSED: weight is [low, wide] instead of
// [wide, low].
//
// Column n of tile j is column 8 (n / 2) + 2 j + n % 2 of the warp's 32: so the four tiles give lane
// (g, t) columns 8 t .. 8 t + 7 of rows g and g + 8, and with TRANSPOSED the lane finds column g of the
// four tiles in the four words of one load.
template <int STEPS, bool TRANSPOSED, bool VECTOR>
DEVICE void up_product(half* out, const half* __restrict__ x, const half* __restrict__ weight, u32 rows, u32 wide,
                       u32 low, float scale, u32 accumulate, u32 block_rows) {
    const Lane lane = lane_of_thread();
    const u32 first = 32 * (WARPS * blockIdx.x + lane.warp);
    if (first >= wide) return;

    u32 b[STEPS][4][2];
#pragma unroll
    for (u32 step = 0; step < STEPS; step++)
#pragma unroll
        for (u32 part = 0; part < 2; part++) {
            const u32 k = 16 * step + 8 * part + 2 * lane.t;
            const u32 column = first + 8 * (lane.g / 2);
            if (TRANSPOSED) {
                const half* row = weight + (u64)k * wide;
                const Eight one = load_eight<VECTOR>(row, column, k < low ? wide : 0);
                const Eight next = load_eight<VECTOR>(row + wide, column, k + 1 < low ? wide : 0);
#pragma unroll
                for (u32 j = 0; j < 4; j++) b[step][j][part] = pair_halves(one.word[j], next.word[j], lane.g % 2);
            } else {
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    const u32 n = column + 2 * j + lane.g % 2;
                    b[step][j][part] = load_two<VECTOR>(weight + (u64)n * low, k, n < wide ? low : 0);
                }
            }
        }

    const u32 begin = blockIdx.y * block_rows;
    const u32 end = rows - begin < block_rows ? rows : begin + block_rows;
    const u32 column = first + 8 * lane.t;
    for (u32 above = begin + lane.g; above < end + lane.g; above += 16) {
        const u32 below = above + 8;
        const half* above_row = x + (u64)above * low;
        const half* below_row = x + (u64)below * low;
        const u32 above_low = above < end ? low : 0, below_low = below < end ? low : 0;
        float d[4][4] = {};
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            const u32 k = 16 * step + 2 * lane.t;
            const u32 a[4] = {
                load_two<VECTOR>(above_row, k, above_low), load_two<VECTOR>(below_row, k, below_low),
                load_two<VECTOR>(above_row, k + 8, above_low), load_two<VECTOR>(below_row, k + 8, below_low)};
#pragma unroll
            for (u32 j = 0; j < 4; j++) mma_m16n8k16(d[j], a, b[step][j][0], b[step][j][1]);
        }
        const float above_value[8] = {d[0][0], d[0][1], d[1][0], d[1][1], d[2][0], d[2][1], d[3][0], d[3][1]};
        const float below_value[8] = {d[0][2], d[0][3], d[1][2], d[1][3], d[2][2], d[2][3], d[3][2], d[3][3]};
        store_eight<VECTOR>(out + (u64)above * wide, column, above < end ? wide : 0, above_value, scale, accumulate);
        store_eight<VECTOR>(out + (u64)below * wide, column, below < end ? wide : 0, below_value, scale, accumulate);
    }
}

// dweight += scale * (sum over rows of wide_row lowᵀ): 32 columns of the wide side per block, the rows
// cut among the warps, sixteen at a time. `low_major`: dweight is [low, wide], else [wide, low].
//
// The wide side is the first operand, its columns are the rows m of a product and its rows are k. Lane
// (g, t) loads columns 8 (g / 2) .. + 7 of the rows k = 2 t, 2 t + 1 and 8 further; m = g of product q is
// column 8 (g / 2) + 4 q + g % 2, and m = g + 8 two columns further.
template <int TILES, bool VECTOR>
DEVICE void gradient_product(float* dweight, const half* __restrict__ x_wide, const half* __restrict__ x_low, u32 rows,
                             u32 wide, u32 low, float scale, u32 low_major) {
    constexpr int PITCH = 8 * TILES + 1;
    constexpr int UNROLL = VECTOR && TILES < 4 ? 2 : 1;
    __shared__ float tile[32 * PITCH];
    const Lane lane = lane_of_thread();
    const u32 first = 32 * blockIdx.x;
    const u32 column = first + 8 * (lane.g / 2);

    float d[2][TILES][4] = {};
#pragma unroll UNROLL
    for (u32 start = 16 * lane.warp; start < rows; start += 16 * WARPS) {
        Eight w[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 row = start + 2 * lane.t + 8 * (i / 2) + i % 2;
            w[i] = load_eight<VECTOR>(x_wide + (u64)row * wide, column, row < rows ? wide : 0);
        }
        const bool odd = lane.g % 2;
        u32 a[2][4];
#pragma unroll
        for (u32 q = 0; q < 2; q++)
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 pair = 2 * (i / 2), word = 2 * q + i % 2;
                a[q][i] = pair_halves(w[pair].word[word], w[pair + 1].word[word], odd);
            }
#pragma unroll
        for (u32 j = 0; j < TILES; j++) {
            const u32 n = 8 * j + lane.g;
            u32 bits[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 row = start + 2 * lane.t + 8 * (i / 2) + i % 2;
                bits[i] = bits_of(x_low + (u64)row * low, n, row < rows ? low : 0);
            }
            const u32 b0 = bits[0] | bits[1] << 16, b1 = bits[2] | bits[3] << 16;
            mma_m16n8k16(d[0][j], a[0], b0, b1);
            mma_m16n8k16(d[1][j], a[1], b0, b1);
        }
    }

    for (u32 turn = 0; turn < WARPS; turn++) {
        if (lane.warp == turn) {
#pragma unroll
            for (u32 q = 0; q < 2; q++)
#pragma unroll
                for (u32 j = 0; j < TILES; j++)
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        const u32 c = 8 * (lane.g / 2) + 4 * q + 2 * (i / 2) + lane.g % 2;
                        add_part(tile[c * PITCH + 8 * j + 2 * lane.t + i % 2], d[q][j][i], turn);
                    }
        }
        __syncthreads();
    }
    for (u32 i = threadIdx.x; i < 32 * low; i += ADAPTER_THREADS) {
        const u32 c = low_major ? i % 32 : i / low, n = low_major ? i / 32 : i % low;
        if (first + c >= wide) continue;
        const u64 place = low_major ? (u64)n * wide + first + c : (u64)(first + c) * low + n;
        dweight[place] += scale * tile[c * PITCH + n];
    }
}

// Each family has kernels for ranks up to R = 8, 16, 32 and 64 where wide is a multiple of 8 and low of
// 2, so that rows can be loaded 16 and 4 bytes at once; and one, _any, for all other shapes up to 64.
#define FAMILY(DEFINE)      \
    DEFINE(_8, 8, true)     \
    DEFINE(_16, 16, true)   \
    DEFINE(_32, 32, true)   \
    DEFINE(_64, 64, true)   \
    DEFINE(_any, 64, false)

// low_rank_down: out = scale * x weightᵀ, added to what out holds with `accumulate`.
// low_rank_down_transposed: out = scale * x weight, the same with weight [wide, low].
//
// out [T, low] half, x [T, wide] half, weight [low, wide] or [wide, low] half.
// Precision: half products, float sums on tensor cores; the warps' sums are added in order; scale and
// the addition in float; rounded once.
// Geometry: 256 threads per 16 rows, gridDim.x = ceil(T / 16); eight warps cut the sum over `wide`.
// Bound by reading x; from rank 32 on by reading the weight from L2, once per 16 rows.
#define DOWN(NAME, RANK, VECTOR)                                                                                    \
    KERNEL __launch_bounds__(ADAPTER_THREADS)                                                                       \
    low_rank_down##NAME(half* out, const half* x, const half* weight, u32 rows, u32 wide, u32 low, float scale,     \
                        u32 accumulate) {                                                                           \
        down_product<RANK / 8, false, VECTOR>(out, x, weight, rows, wide, low, scale, accumulate);                  \
    }                                                                                                               \
    KERNEL __launch_bounds__(ADAPTER_THREADS)                                                                       \
    low_rank_down_transposed##NAME(half* out, const half* x, const half* weight, u32 rows, u32 wide, u32 low,       \
                                   float scale, u32 accumulate) {                                                   \
        down_product<RANK / 8, true, VECTOR>(out, x, weight, rows, wide, low, scale, accumulate);                   \
    }
FAMILY(DOWN)

// low_rank_up: out = scale * x weightᵀ, added to what out holds with `accumulate`.
// low_rank_up_transposed: out = scale * x weight, the same with weight [low, wide].
//
// out [T, wide] half, x [T, low] half, weight [wide, low] or [low, wide] half.
// Precision: half products, float sums on tensor cores; scale and the addition in float; rounded once.
// Geometry: 256 threads per 256 columns and `block_rows` rows (a multiple of 16),
// gridDim = (ceil(wide / 256), ceil(T / block_rows)).
// Bound by writing out, and reading it with `accumulate`.
#define UP(NAME, RANK, VECTOR)                                                                                      \
    KERNEL __launch_bounds__(ADAPTER_THREADS)                                                                       \
    low_rank_up##NAME(half* out, const half* x, const half* weight, u32 rows, u32 wide, u32 low, float scale,       \
                      u32 accumulate, u32 block_rows) {                                                             \
        up_product<(RANK + 8) / 16, false, VECTOR>(out, x, weight, rows, wide, low, scale, accumulate, block_rows); \
    }                                                                                                               \
    KERNEL __launch_bounds__(ADAPTER_THREADS)                                                                       \
    low_rank_up_transposed##NAME(half* out, const half* x, const half* weight, u32 rows, u32 wide, u32 low,         \
                                 float scale, u32 accumulate, u32 block_rows) {                                     \
        up_product<(RANK + 8) / 16, true, VECTOR>(out, x, weight, rows, wide, low, scale, accumulate, block_rows);  \
    }
FAMILY(UP)

// low_rank_gradient: dweight += scale * x_lowᵀ x_wide (`low_major`), or its transpose.
//
// dweight [low, wide] or [wide, low] float, x_wide [T, wide] half, x_low [T, low] half.
// Precision: half products, float sums on tensor cores; the warps' sums are added in order; scale and
// the addition in float.
// Geometry: 256 threads per 32 columns of the wide side, gridDim.x = ceil(wide / 32); eight warps cut
// the sum over T, so no two blocks meet in a sum.
// Bound by reading x_wide; from rank 32 on by reading x_low from L2, once per 32 columns.
#define GRADIENT(NAME, RANK, VECTOR)                                                                                \
    KERNEL __launch_bounds__(ADAPTER_THREADS)                                                                       \
    low_rank_gradient##NAME(float* dweight, const half* x_wide, const half* x_low, u32 rows, u32 wide, u32 low,     \
                            float scale, u32 low_major) {                                                           \
        gradient_product<RANK / 8, VECTOR>(dweight, x_wide, x_low, rows, wide, low, scale, low_major);              \
    }
FAMILY(GRADIENT)

// low_rank_backward_8, _16: the gradients of out = scale * low weightᵀ in one pass over dout, for rank R =
// 8 or 16 and wide a multiple of 8: per block what its part of dout adds to dlow and to dweight.
//
// dlow_parts [column chunks, T, R] float, dweight_parts [row chunks, wide, R] float, dout [T, wide] half,
// low [T, R] half, weight [wide, R] half.
// Precision: half products, float sums on tensor cores; scale comes with add_low_rank_parts.
// Geometry: 256 threads, gridDim = (ceil(wide / 512), ceil(T / 256)): chunks of 512 columns and 256 rows,
// taken as tiles of 128 rows and 64 columns, two of which are under way. A warp owns 16 rows of a tile for
// dlow, which it adds up over all columns of the chunk; for dweight it owns 16 columns and half of the rows,
// added up over the rows of the chunk.
// Bound by reading dout once, and writing parts: 2 R / 512 of that for dlow, 2 R / 256 for dweight.
#define PART_ROWS 256
#define PART_COLUMNS 512
#define TILE_ROWS 128
#define TILE_COLUMNS 64
// Pieces of 16 bytes in a row of a tile. Piece c of row r stands in place c ^ r % 8, so that the eight rows
// of one column that ldmatrix takes at once lie in different banks.
#define TILE_PIECES (TILE_COLUMNS / 8)

DEVICE u32 piece_of_tile(u32 row, u32 piece) { return TILE_PIECES * row + (piece ^ (row & 7)); }

// The second operand of products over 16 rows of `matrix` from `row` on, [rows, 8 N] in pieces.
template <int N> DEVICE void load_second(u32 (&b)[N][2], const uint4* matrix, u32 row) {
    const u32 i = (threadIdx.x & 31) >> 3, j = threadIdx.x & 7;
    u32 word[4];
    // With N = 1 the upper two matrices are those of the lower two once more.
    ldmatrix_x4_transposed(word, matrix + N * (row + 8 * (i & 1) + j) + (N == 1 ? 0 : i >> 1));
#pragma unroll
    for (u32 n = 0; n < N; n++) {
        b[n][0] = word[2 * n];
        b[n][1] = word[2 * n + 1];
    }
}

template <int R>
DEVICE void backward_product(float* dlow_parts, float* dweight_parts, const half* __restrict__ dout,
                             const half* __restrict__ low, const half* __restrict__ weight, u32 rows, u32 wide) {
    constexpr int N = R / 8;
    __shared__ uint4 tile[2][TILE_ROWS * TILE_PIECES];
    __shared__ uint4 weights[2][TILE_COLUMNS * N];
    __shared__ uint4 lows[PART_ROWS * N];
    __shared__ float other[TILE_COLUMNS * R];
    const Lane lane = lane_of_thread();
    const u32 i = (threadIdx.x & 31) >> 3, j = threadIdx.x & 7;
    const u32 first_row = PART_ROWS * blockIdx.y, first_column = PART_COLUMNS * blockIdx.x;
    const u32 rest = wide - first_column;
    const u32 steps = ceil_div(rest < PART_COLUMNS ? rest : PART_COLUMNS, TILE_COLUMNS);

    // Tile t of a step: the upper or the lower rows; the weights of its columns come with the upper one.
    const auto fetch = [&](u32 step, u32 t) {
        const u32 column = first_column + TILE_COLUMNS * step, top = first_row + TILE_ROWS * t;
        for (u32 at = threadIdx.x; at < TILE_ROWS * TILE_PIECES; at += ADAPTER_THREADS) {
            const u32 row = at / TILE_PIECES, piece = at % TILE_PIECES;
            const bool valid = top + row < rows && column + 8 * piece < wide;
            const half* from = valid ? dout + (u64)(top + row) * wide + column + 8 * piece : dout;
            cp_async16(&tile[t][piece_of_tile(row, piece)], from, valid);
        }
        if (t == 0 && threadIdx.x < TILE_COLUMNS * N) {
            const u32 k = column + threadIdx.x / N;
            const half* from = k < wide ? weight + (u64)k * R + 8 * (threadIdx.x % N) : weight;
            cp_async16(&weights[step % 2][threadIdx.x], from, k < wide);
        }
        cp_async_commit();
    };
    for (u32 at = threadIdx.x; at < PART_ROWS * N; at += ADAPTER_THREADS) {
        const u32 row = first_row + at / N;
        const half* from = row < rows ? low + (u64)row * R + 8 * (at % N) : low;
        cp_async16(&lows[at], from, row < rows);
    }
    fetch(0, 0);

    // For dlow rows 16 warp .. of a tile; for dweight columns 16 (warp % 4) .. and rows 64 (warp / 4) ...
    const u32 band = lane.warp % 4, side = lane.warp / 4;
    float dlow[2][N][4] = {};
    for (u32 step = 0; step < steps; step++) {
        float dweight[N][4] = {};
#pragma unroll
        for (u32 t = 0; t < 2; t++) {
            if (t == 0) {
                fetch(step, 1);
            } else if (step + 1 < steps) {
                fetch(step + 1, 0);
            } else {
                cp_async_commit();
            }
            cp_async_wait<1>();
            __syncthreads();
#pragma unroll
            for (u32 k = 0; k < TILE_COLUMNS / 16; k++) {
                u32 a[4], b[N][2];
                const u32 row = 16 * lane.warp + 8 * (i & 1) + j;
                ldmatrix_x4(a, &tile[t][piece_of_tile(row, 2 * k + (i >> 1))]);
                load_second<N>(b, weights[step % 2], 16 * k);
#pragma unroll
                for (u32 n = 0; n < N; n++) mma_m16n8k16(dlow[t][n], a, b[n][0], b[n][1]);
            }
#pragma unroll
            for (u32 k = 0; k < TILE_ROWS / 32; k++) {
                u32 a[4], b[N][2];
                const u32 top = TILE_ROWS / 2 * side + 16 * k;
                const u32 row = top + 8 * (i >> 1) + j;
                ldmatrix_x4_transposed(a, &tile[t][piece_of_tile(row, 2 * band + (i & 1))]);
                load_second<N>(b, lows, TILE_ROWS * t + top);
#pragma unroll
                for (u32 n = 0; n < N; n++) mma_m16n8k16(dweight[n], a, b[n][0], b[n][1]);
            }
            if (t == 1 && side == 1) {
#pragma unroll
                for (u32 n = 0; n < N; n++)
#pragma unroll
                    for (u32 q = 0; q < 4; q++) {
                        const u32 m = 16 * band + lane.g + 8 * (q / 2);
                        other[m * R + 8 * n + 2 * lane.t + q % 2] = dweight[n][q];
                    }
            }
            __syncthreads();
        }
        if (side == 0) {
            const u32 column = first_column + TILE_COLUMNS * step;
#pragma unroll
            for (u32 n = 0; n < N; n++)
#pragma unroll
                for (u32 q = 0; q < 4; q++) {
                    const u32 m = 16 * band + lane.g + 8 * (q / 2), r = 8 * n + 2 * lane.t + q % 2;
                    if (column + m >= wide) continue;
                    const u64 place = ((u64)blockIdx.y * wide + column + m) * R + r;
                    dweight_parts[place] = dweight[n][q] + other[m * R + r];
                }
        }
    }
#pragma unroll
    for (u32 t = 0; t < 2; t++)
#pragma unroll
        for (u32 n = 0; n < N; n++)
#pragma unroll
            for (u32 q = 0; q < 4; q++) {
                const u32 row = first_row + TILE_ROWS * t + 16 * lane.warp + lane.g + 8 * (q / 2);
                if (row >= rows) continue;
                const u64 place = ((u64)blockIdx.x * rows + row) * R + 8 * n + 2 * lane.t + q % 2;
                dlow_parts[place] = dlow[t][n][q];
            }
}

KERNEL __launch_bounds__(ADAPTER_THREADS)
low_rank_backward_8(float* dlow_parts, float* dweight_parts, const half* dout, const half* low, const half* weight,
                    u32 rows, u32 wide) {
    backward_product<8>(dlow_parts, dweight_parts, dout, low, weight, rows, wide);
}

KERNEL __launch_bounds__(ADAPTER_THREADS)
low_rank_backward_16(float* dlow_parts, float* dweight_parts, const half* dout, const half* low, const half* weight,
                     u32 rows, u32 wide) {
    backward_product<16>(dlow_parts, dweight_parts, dout, low, weight, rows, wide);
}

// add_low_rank_parts: dlow = scale * (sum of its parts), dweight += scale * (sum of its parts), parts ascending.
//
// dlow [T, low] half, dweight [wide, low] float. A thread per value of both; small beside the kernel above.
KERNEL __launch_bounds__(ADAPTER_THREADS)
add_low_rank_parts(half* dlow, float* dweight, const float* dlow_parts, const float* dweight_parts, u32 rows, u32 wide,
                   u32 low, u32 column_chunks, u32 row_chunks, float scale) {
    const u64 of_dlow = (u64)rows * low, of_dweight = (u64)wide * low;
    u64 at = grid_first();
    float sum = 0.0f;
    if (at < of_dlow) {
        for (u64 chunk = 0; chunk < column_chunks; chunk++) sum += dlow_parts[chunk * of_dlow + at];
        dlow[at] = to_half(scale * sum);
        return;
    }
    at -= of_dlow;
    if (at >= of_dweight) return;
    for (u64 chunk = 0; chunk < row_chunks; chunk++) sum += dweight_parts[chunk * of_dweight + at];
    dweight[at] += scale * sum;
}
