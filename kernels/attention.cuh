// What attention's forward and backward kernels share: where heads lie, who sees whom, tiles in
// shared memory and their fragments.
//
// Letters: T rows (tokens), N query heads, G key/value heads, D head_dim, P prefix positions, S
// sequences; WIDTH is D padded with zeros to 16, 32, 64, 96 or 128.
//
// Query i of a sequence stands at t = kv_len - q_len + i. It sees all prefix keys, and key k of its
// sequence when k <= t or k < context_length: always keys 0 .. visible(i), at least one.
//
// The work is cut by the host: a list of tiles of 64 queries or of 64 keys, heaviest first, each
// inside one sequence, so that no block is empty. blockIdx.x is the place in that list, blockIdx.y the
// head; a block has 128 threads, and a warp owns 16 of the tile's 64 rows.
#pragma once
#include "mma.cuh"
#include "spans.cuh"

#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

constexpr u32 ATTENTION_THREADS = 128;
constexpr u32 TILE_ROWS = 64;
constexpr u32 WARP_ROWS = 16;

// `HeadLayout` of src/backend/shapes.rs.
struct HeadPlace {
    u32 row, offset, stride;
};

struct AttentionShape {
    u32 heads, kv_heads, head_dim;
    HeadPlace query, key, value;
    // P, and elements from the prefix of one sequence to that of the next (0: all share one).
    u32 prefix_len;
    u32 prefix_stride;
    float scale;
};

// 64 queries, or 64 keys, of a sequence. Keys are counted in tiles: those of the prefix, then those of
// the sequence, which start a tile of their own.
struct Tile {
    u32 sequence, index;
};

// ---- who sees whom

// Keys of the sequence that query i sees; rows behind the last query see what it sees.
DEVICE u32 visible(const Span& span, u32 i) {
    const u32 t = span.kv_len - span.q_len + i;
    const u32 seen = t + 1 > span.context_length ? t + 1 : span.context_length;
    return seen < span.kv_len ? seen : span.kv_len;
}

// Keys of the sequence that some query of a warp sees, whose queries begin at i; 0 behind the last.
DEVICE u32 visible_to_warp(const Span& span, u32 i) {
    if (i >= span.q_len) return 0;
    const u32 last = i + WARP_ROWS < span.q_len ? i + WARP_ROWS : span.q_len;
    return visible(span, last - 1);
}

// First query that sees key k.
DEVICE u32 first_observer(const Span& span, u32 k) {
    const u32 before = span.kv_len - span.q_len;
    return k < span.context_length || k <= before ? 0 : k - before;
}

// ---- where rows lie

// Rows of one head: row i starts at `first + i * step`.
template <class T> struct Rows {
    T* first;
    u64 step;
    u32 len;
};

// By value and field by field, so that it stays in registers.
DEVICE Rows<const half> either(bool condition, Rows<const half> a, Rows<const half> b) {
    a.first = condition ? a.first : b.first;
    a.step = condition ? a.step : b.step;
    a.len = condition ? a.len : b.len;
    return a;
}

template <class T> DEVICE Rows<T> rows_of(T* x, HeadPlace place, u32 head, u32 start, u32 len) {
    Rows<T> rows;
    rows.first = x + (u64)start * place.row + place.offset + (u64)head * place.stride;
    rows.step = place.row;
    rows.len = len;
    return rows;
}

// Rows of `[T, N, D]`.
template <class T>
DEVICE Rows<T> packed_rows(T* x, const AttentionShape& shape, u32 head, u32 start, u32 len) {
    HeadPlace place;
    place.row = shape.heads * shape.head_dim;
    place.offset = 0;
    place.stride = shape.head_dim;
    return rows_of(x, place, head, start, len);
}

// Prefix keys (part 0) or values (part 1) of a sequence, in `[P, 2, G, D]`.
template <class T>
DEVICE Rows<T> prefix_rows(T* prefix, const AttentionShape& shape, u64 sequence_stride, u32 sequence, u32 part, u32 kv_head) {
    Rows<T> rows;
    rows.first = prefix + sequence * sequence_stride + (u64)(part * shape.kv_heads + kv_head) * shape.head_dim;
    rows.step = 2 * (u64)shape.kv_heads * shape.head_dim;
    rows.len = shape.prefix_len;
    return rows;
}

// Keys and values that one query head sees.
struct KeyValue {
    Rows<const half> prefix_key, prefix_value, key, value;
};

DEVICE KeyValue key_value_of(const half* key_value, const half* prefix, const AttentionShape& shape, const Span& span, u32 sequence,
                             u32 kv_head) {
    KeyValue rows;
    rows.prefix_key = prefix_rows(prefix, shape, shape.prefix_stride, sequence, 0, kv_head);
    rows.prefix_value = prefix_rows(prefix, shape, shape.prefix_stride, sequence, 1, kv_head);
    rows.key = rows_of(key_value, shape.key, kv_head, span.kv_start, span.kv_len);
    rows.value = rows_of(key_value, shape.value, kv_head, span.kv_start, span.kv_len);
    return rows;
}

// ---- tiles in shared memory: rows of WIDTH halves, 16 bytes apart in their banks, so that eight rows
// of a fragment lie in different banks

DEVICE constexpr u32 pitch(u32 width) { return width + 8; }

// Copies rows first .. first + ROWS into a tile; columns from head_dim on and rows behind the last
// become zero. Asynchronous where cp.async is.
template <u32 WIDTH, u32 ROWS>
DEVICE void load_tile(half* tile, Rows<const half> rows, u32 first, u32 head_dim) {
    constexpr u32 CHUNKS = WIDTH / 8;
#pragma unroll
    for (u32 chunk = threadIdx.x; chunk < ROWS * CHUNKS; chunk += ATTENTION_THREADS) {
        const u32 row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        const bool valid = first + row < rows.len && column < head_dim;
        const half* source = valid ? rows.first + (first + row) * rows.step + column : rows.first;
        cp_async16(tile + row * pitch(WIDTH) + column, source, valid);
    }
}

// Fragment a of mma: rows row .. row + 16, columns column .. column + 16 of a tile.
template <u32 WIDTH> DEVICE void load_a(u32 (&a)[4], const half* tile, u32 row, u32 column) {
    const u32 lane = threadIdx.x & 31;
    ldmatrix_x4(a, tile + (row + (lane & 15)) * pitch(WIDTH) + column + (lane >> 4) * 8);
}

// Two fragments b, of columns 0 .. 8 and 8 .. 16 of b, where column n of b is row `row + n` of the tile.
template <u32 WIDTH> DEVICE void load_b_of_rows(u32 (&b)[4], const half* tile, u32 row, u32 column) {
    const u32 lane = threadIdx.x & 31;
    ldmatrix_x4(b, tile + (row + (lane & 7) + (lane >> 4) * 8) * pitch(WIDTH) + column + (lane >> 3 & 1) * 8);
}

// Two fragments b, of columns 0 .. 8 and 8 .. 16 of b, where row k of b is row `row + k` of the tile.
template <u32 WIDTH> DEVICE void load_b_of_columns(u32 (&b)[4], const half* tile, u32 row, u32 column) {
    const u32 lane = threadIdx.x & 31;
    ldmatrix_x4_transposed(b, tile + (row + (lane & 15)) * pitch(WIDTH) + column + (lane >> 4) * 8);
}

// d [16, 8 COUNT] += a [16, WIDTH] bᵀ, with a in registers and b the first 8 COUNT rows of a tile.
template <u32 WIDTH, u32 COUNT>
DEVICE void multiply_by_rows(float (&d)[COUNT][4], const u32 (&a)[WIDTH / 16][4], const half* tile) {
#pragma unroll
    for (u32 k = 0; k < WIDTH / 16; k++)
#pragma unroll
        for (u32 n = 0; n < COUNT / 2; n++) {
            u32 b[4];
            load_b_of_rows<WIDTH>(b, tile, 16 * n, 16 * k);
            mma_m16n8k16(d[2 * n], a[k], b[0], b[1]);
            mma_m16n8k16(d[2 * n + 1], a[k], b[2], b[3]);
        }
}

// The same with a as 16 rows of another tile.
template <u32 WIDTH, u32 COUNT>
DEVICE void multiply_rows(float (&d)[COUNT][4], const half* a_tile, u32 a_row, const half* tile) {
#pragma unroll
    for (u32 k = 0; k < WIDTH / 16; k++) {
        u32 a[4];
        load_a<WIDTH>(a, a_tile, a_row, 16 * k);
#pragma unroll
        for (u32 n = 0; n < COUNT / 2; n++) {
            u32 b[4];
            load_b_of_rows<WIDTH>(b, tile, 16 * n, 16 * k);
            mma_m16n8k16(d[2 * n], a, b[0], b[1]);
            mma_m16n8k16(d[2 * n + 1], a, b[2], b[3]);
        }
    }
}

// d [16, WIDTH] += a [16, 8 COUNT] b, with a the result of a product, rounded to half, and b the first
// 8 COUNT rows of a tile. Two neighbouring results of mma lie as one fragment a does.
template <u32 WIDTH, u32 COUNT>
DEVICE void multiply_by_columns(float (&d)[WIDTH / 8][4], const float (&a)[COUNT][4], const half* tile) {
#pragma unroll
    for (u32 k = 0; k < COUNT / 2; k++) {
        const u32 rounded[4] = {pack_half2(a[2 * k][0], a[2 * k][1]), pack_half2(a[2 * k][2], a[2 * k][3]),
                                pack_half2(a[2 * k + 1][0], a[2 * k + 1][1]), pack_half2(a[2 * k + 1][2], a[2 * k + 1][3])};
#pragma unroll
        for (u32 n = 0; n < WIDTH / 16; n++) {
            u32 b[4];
            load_b_of_columns<WIDTH>(b, tile, 16 * k, 16 * n);
            mma_m16n8k16(d[2 * n], rounded, b[0], b[1]);
            mma_m16n8k16(d[2 * n + 1], rounded, b[2], b[3]);
        }
    }
}

template <u32 COUNT> DEVICE void set_zero(float (&d)[COUNT][4]) {
#pragma unroll
    for (u32 n = 0; n < COUNT; n++) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.0f;
}

// Row (of the warp's 16) and column of element c of result n of mma.
DEVICE u32 result_row(u32 c) { return ((threadIdx.x & 31) >> 2) + (c >> 1) * 8; }
DEVICE u32 result_column(u32 n, u32 c) { return n * 8 + (threadIdx.x & 3) * 2 + (c & 1); }

// Writes 16 rows of results, rounded, to rows first .. of a head: through `room`, 16 rows of a tile that
// belong to this warp, so that 16 bytes are written at once. Rows behind the last are left out.
template <u32 WIDTH>
DEVICE void store_rows(Rows<half> rows, u32 first, u32 head_dim, const float (&d)[WIDTH / 8][4], float factor_low,
                       float factor_high, half* room) {
    constexpr u32 CHUNKS = WIDTH / 8;
    const u32 lane = threadIdx.x & 31;
    __syncwarp();
#pragma unroll
    for (u32 n = 0; n < CHUNKS; n++) {
        const u32 at = result_row(0) * pitch(WIDTH) + result_column(n, 0);
        *reinterpret_cast<u32*>(room + at) = pack_half2(d[n][0] * factor_low, d[n][1] * factor_low);
        *reinterpret_cast<u32*>(room + at + 8 * pitch(WIDTH)) = pack_half2(d[n][2] * factor_high, d[n][3] * factor_high);
    }
    __syncwarp();
#pragma unroll
    for (u32 chunk = lane; chunk < WARP_ROWS * CHUNKS; chunk += 32) {
        const u32 row = chunk / CHUNKS, column = chunk % CHUNKS * 8;
        if (first + row < rows.len && column < head_dim)
            *reinterpret_cast<uint4*>(rows.first + (first + row) * rows.step + column) =
                *reinterpret_cast<const uint4*>(room + row * pitch(WIDTH) + column);
    }
}

// ---- the plain kernels: any head_dim up to 256 and any alignment, one warp per row

constexpr u32 PLAIN_DIM = 256;

DEVICE float dot_rows(const half* a, const half* b, u32 head_dim) {
    float sum = 0.0f;
#pragma unroll 1
    for (u32 d = 0; d < head_dim; d++) sum += to_float(a[d]) * to_float(b[d]);
    return sum;
}

// sums[i] += sum over lanes j < count of factor_j * row_j[lane + 32 i], lanes ascending.
DEVICE void add_rows(float (&sums)[PLAIN_DIM / 32], float factor, const half* rows, u64 step, u32 count, u32 head_dim) {
    const u32 lane = threadIdx.x & 31;
#pragma unroll 1
    for (u32 j = 0; j < count; j++) {
        const float of_row = __shfl_sync(FULL_WARP, factor, j);
        const half* row = rows + j * step;
#pragma unroll
        for (u32 i = 0; i < PLAIN_DIM / 32; i++)
            if (lane + 32 * i < head_dim) sums[i] += of_row * to_float(row[lane + 32 * i]);
    }
}

DEVICE void store_plain(half* row, const float (&sums)[PLAIN_DIM / 32], float factor, u32 head_dim) {
#pragma unroll
    for (u32 i = 0; i < PLAIN_DIM / 32; i++)
        if ((threadIdx.x & 31) + 32 * i < head_dim) row[(threadIdx.x & 31) + 32 * i] = to_half(sums[i] * factor);
}

DEVICE void store_plain(float* row, const float (&sums)[PLAIN_DIM / 32], float factor, u32 head_dim) {
#pragma unroll
    for (u32 i = 0; i < PLAIN_DIM / 32; i++)
        if ((threadIdx.x & 31) + 32 * i < head_dim) row[(threadIdx.x & 31) + 32 * i] = sums[i] * factor;
}
