#include "attention.cuh"

// Softmax attention, forward, in the manner of FlashAttention-2 (Dao 2023).
//
//   out[t] = sum over visible k of softmax(scale * q[t]·k) v,  lse[t] = log of the sum of exponentials
//
// out [T, N, D] half, lse [T, N] float; q, k, v half in rows of any layout, prefix [P, 2, G, D] or
// [S, P, 2, G, D] half.
//
// Precision: q·k by tensor cores with float sums; maximum, exponential (base 2, with the scale and
// log2(e) in one factor, not negative) and sums in float; the exponentials, at most 1, are rounded to
// half for the product with v, not for their sum; out is divided and rounded once; lse float.
//
// Geometry: 64 queries of one head per block, 16 per warp, whose fragments stay in registers. Keys
// come in tiles of 64 (sm_75 with D > 64: of 32), prefix first; tiles that no query of the block sees
// are not visited, tiles that all see are not masked. The values of a tile arrive while its scores are
// computed, the keys of the next while the values are used. Static shared memory: keys and values of
// one tile, 6 KiB (D = 16), 18 KiB (64), 34 KiB (128; sm_75: 17 KiB).
// Bound by tensor cores from about 200 visible keys on, by memory below.

template <u32 WIDTH> DEVICE constexpr u32 forward_keys() {
#if __CUDA_ARCH__ >= 800
    return 64;
#else
    return WIDTH > 64 ? 32 : 64;
#endif
}

template <u32 WIDTH>
DEVICE void attention_forward(half* out, float* lse, const half* query, const half* key_value, const half* prefix, const Span* spans,
                              const Tile* tiles, const AttentionShape& shape) {
    constexpr u32 KEYS = forward_keys<WIDTH>();
    __shared__ __align__(16) half shared[2 * KEYS * pitch(WIDTH)];
    half* const key_tile = shared;
    half* const value_tile = shared + KEYS * pitch(WIDTH);

    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.sequence];
    const u32 head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads);
    const u32 first = tile.index * TILE_ROWS;
    const u32 own_row = threadIdx.x / 32 * WARP_ROWS;
    const KeyValue rows = key_value_of(key_value, prefix, shape, span, tile.sequence, kv_head);

    // The queries pass through the place of the first keys and values.
    load_tile<WIDTH, TILE_ROWS>(shared, rows_of(query, shape.query, head, span.q_start, span.q_len), first, shape.head_dim);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    u32 queries[WIDTH / 16][4];
#pragma unroll
    for (u32 k = 0; k < WIDTH / 16; k++) load_a<WIDTH>(queries[k], shared, own_row, 16 * k);
    __syncthreads();

    const u32 end = first + TILE_ROWS < span.q_len ? first + TILE_ROWS : span.q_len;
    const u32 prefix_tiles = ceil_div(shape.prefix_len, KEYS);
    const u32 all_tiles = prefix_tiles + ceil_div(visible(span, end - 1), KEYS);
    const u32 seen_by_all = visible(span, first);
    const u32 seen[2] = {visible(span, first + own_row + result_row(0)), visible(span, first + own_row + result_row(2))};
    const u32 seen_by_warp = visible_to_warp(span, first + own_row);
    const float factor = shape.scale * LOG2_E;

    float sums[WIDTH / 8][4];
    set_zero(sums);
    // Largest score so far, -log2 of what the exponentials are divided by, and their sum.
    float top[2] = {-INFINITE, -INFINITE}, minus[2] = {INFINITE, INFINITE}, total[2] = {0.0f, 0.0f};

    // Tile n of the keys or values, that is of the prefix or of the sequence.
    auto load = [&](half* place, Rows<const half> of_prefix, Rows<const half> of_sequence, u32 n) {
        const bool in_prefix = n < prefix_tiles;
        load_tile<WIDTH, KEYS>(place, either(in_prefix, of_prefix, of_sequence), (in_prefix ? n : n - prefix_tiles) * KEYS, shape.head_dim);
        cp_async_commit();
    };
    load(key_tile, rows.prefix_key, rows.key, 0);

    for (u32 n = 0; n < all_tiles; n++) {
        // The keys are here, and no warp uses the last values any more.
        cp_async_wait<0>();
        __syncthreads();
        load(value_tile, rows.prefix_value, rows.value, n);

        const bool in_prefix = n < prefix_tiles;
        const u32 first_key = (in_prefix ? n : n - prefix_tiles) * KEYS;
        // A warp has nothing to do with keys that none of its queries sees.
        const bool sees = seen_by_warp > (in_prefix ? 0 : first_key);
        float scores[KEYS / 8][4];
        if (sees) {
            set_zero(scores);
            multiply_by_rows<WIDTH>(scores, queries, key_tile);

            if (first_key + KEYS > (in_prefix ? shape.prefix_len : seen_by_all)) {
#pragma unroll
                for (u32 i = 0; i < KEYS / 8; i++)
#pragma unroll
                    for (u32 c = 0; c < 4; c++) {
                        const u32 key = first_key + result_column(i, c);
                        if (key >= (in_prefix ? shape.prefix_len : seen[c >> 1])) scores[i][c] = -INFINITE;
                    }
            }

            // Every query sees a key of the first tile, so that `top` is a number from there on.
#pragma unroll
            for (u32 half_row = 0; half_row < 2; half_row++) {
                float& most = top[half_row];
#pragma unroll
                for (u32 i = 0; i < KEYS / 8; i++) most = fmaxf(most, fmaxf(scores[i][2 * half_row], scores[i][2 * half_row + 1]));
                most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
                most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
                const float before = minus[half_row];
                minus[half_row] = -most * factor;
                const float shrink = exp2f(minus[half_row] - before);
                total[half_row] *= shrink;
#pragma unroll
                for (u32 i = 0; i < WIDTH / 8; i++) {
                    sums[i][2 * half_row] *= shrink;
                    sums[i][2 * half_row + 1] *= shrink;
                }
            }
#pragma unroll
            for (u32 i = 0; i < KEYS / 8; i++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    scores[i][c] = exp2f(scores[i][c] * factor + minus[c >> 1]);
                    total[c >> 1] += scores[i][c];
                }
        }

        // The values are here, and no warp uses the keys any more.
        cp_async_wait<0>();
        __syncthreads();
        if (n + 1 < all_tiles) load(key_tile, rows.prefix_key, rows.key, n + 1);
        if (sees) multiply_by_columns<WIDTH>(sums, scores, value_tile);
    }

    float inverse[2];
#pragma unroll
    for (u32 half_row = 0; half_row < 2; half_row++) {
        total[half_row] += __shfl_xor_sync(FULL_WARP, total[half_row], 1);
        total[half_row] += __shfl_xor_sync(FULL_WARP, total[half_row], 2);
        inverse[half_row] = 1.0f / total[half_row];
        const u32 i = first + own_row + result_row(2 * half_row);
        if ((threadIdx.x & 3) == 0 && i < span.q_len)
            lse[(u64)(span.q_start + i) * shape.heads + head] = logf(total[half_row]) - minus[half_row] * LN_2;
    }
    __syncthreads();
    store_rows<WIDTH>(packed_rows(out, shape, head, span.q_start, span.q_len), first + own_row, shape.head_dim, sums, inverse[0],
                      inverse[1], shared + own_row * pitch(WIDTH));
}

#define ATTENTION_FORWARD(WIDTH)                                                                                            \
    KERNEL __launch_bounds__(ATTENTION_THREADS)                                                                             \
    attention_forward_##WIDTH(half* out, float* lse, const half* query, const half* key_value, const half* prefix,          \
                              const Span* spans, const Tile* tiles, AttentionShape shape) {                                 \
        attention_forward<WIDTH>(out, lse, query, key_value, prefix, spans, tiles, shape);                                  \
    }
ATTENTION_FORWARD(16)
ATTENTION_FORWARD(32)
ATTENTION_FORWARD(64)
ATTENTION_FORWARD(96)
ATTENTION_FORWARD(128)

// The same in float throughout, for heads that tensor cores cannot take: D that is no multiple of 8 or
// above 128 (up to 256), heads off a 16-byte border, a scale that is not positive. A warp per query: a
// lane per key for the scores, a lane per column for the sums. Bound by the latency of its loads.
KERNEL __launch_bounds__(ATTENTION_THREADS)
attention_forward_plain(half* out, float* lse, const half* query, const half* key_value, const half* prefix, const Span* spans,
                        const Tile* tiles, AttentionShape shape) {
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.sequence];
    const u32 head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads), lane = threadIdx.x & 31;
    const KeyValue rows = key_value_of(key_value, prefix, shape, span, tile.sequence, kv_head);
    const Rows<const half> queries = rows_of(query, shape.query, head, span.q_start, span.q_len);
    const Rows<half> outputs = packed_rows(out, shape, head, span.q_start, span.q_len);

    for (u32 row = threadIdx.x / 32; row < TILE_ROWS; row += ATTENTION_THREADS / 32) {
        const u32 i = tile.index * TILE_ROWS + row;
        if (i >= span.q_len) break;
        float sums[PLAIN_DIM / 32] = {};
        float top = -INFINITE, total = 0.0f;
        auto visit = [&](Rows<const half> keys, Rows<const half> values, u32 len) {
            for (u32 first = 0; first < len; first += 32) {
                const u32 count = len - first < 32 ? len - first : 32;
                float score = -INFINITE;
                if (lane < count)
                    score = shape.scale * dot_rows(queries.first + i * queries.step, keys.first + (first + lane) * keys.step, shape.head_dim);
                const float most = fmaxf(top, warp_max(score));
                const float shrink = expf(top - most), exponential = expf(score - most);
                top = most;
                total = total * shrink + warp_sum(exponential);
#pragma unroll
                for (u32 d = 0; d < PLAIN_DIM / 32; d++) sums[d] *= shrink;
                add_rows(sums, exponential, values.first + first * values.step, values.step, count, shape.head_dim);
            }
        };
        visit(rows.prefix_key, rows.prefix_value, shape.prefix_len);
        visit(rows.key, rows.value, visible(span, i));
        store_plain(outputs.first + i * outputs.step, sums, 1.0f / total, shape.head_dim);
        if (lane == 0) lse[(u64)(span.q_start + i) * shape.heads + head] = top + logf(total);
    }
}

// Keys and values of T rows into a cache: row slots[t] of cache [rows of the cache, 2, G, D] gets the
// key heads and then the value heads of row t of x. Copies; a grid-stride loop over T * 2 G * D elements,
// or over groups of 8 of them where D, rows and places of heads are multiples of 8. Bound by memory.
template <class T>
DEVICE void copy_key_value(T* cache, const T* x, const u32* slots, u32 rows, const AttentionShape& shape, u32 group) {
    const u32 dim = shape.head_dim / group, heads = shape.kv_heads;
    const u64 count = (u64)rows * 2 * heads * dim;
    for (u64 at = grid_first(); at < count; at += grid_step()) {
        const u32 row = (u32)(at / (2 * heads * dim)), rest = (u32)(at % (2 * heads * dim));
        const u32 head = rest / dim % heads, column = rest % dim;
        const HeadPlace place = rest < heads * dim ? shape.key : shape.value;
        const u64 source = ((u64)row * place.row + place.offset + head * place.stride) / group + column;
        cache[(u64)slots[row] * 2 * heads * dim + rest] = x[source];
    }
}

KERNEL __launch_bounds__(256) store_key_value_by_8(half* cache, const half* x, const u32* slots, u32 rows, AttentionShape shape) {
    copy_key_value(reinterpret_cast<uint4*>(cache), reinterpret_cast<const uint4*>(x), slots, rows, shape, 8);
}

KERNEL __launch_bounds__(256) store_key_value_by_1(half* cache, const half* x, const u32* slots, u32 rows, AttentionShape shape) {
    copy_key_value(cache, x, slots, rows, shape, 1);
}
