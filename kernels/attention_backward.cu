#include "attention.cuh"

// Gradient of attention in the manner of FlashAttention-2 (Dao 2023, section 3.1), without atomics: each
// place of dq, dk, dv and dprefix is summed by one warp, in an order that the shape alone decides.
//
//   delta[t] = dout[t]·out[t]           p = exp(scale * q[t]·k - lse[t])       dp = dout[t]·v
//   ds = p (dp - delta[t])              dv = sum over t of p dout[t]
//   dq[t] = scale * sum over k of ds k  dk = scale * sum over t of ds q[t]
//
// dqkv, qkv half in rows of any layout; dout, out [T, N, D] half; lse, delta [T, N] float; prefix
// [P, 2, G, D] or [S, P, 2, G, D] half; dprefix [S, P, 2, G, D] float. Scores are computed anew.
//
// Precision of all: products of halves by tensor cores with float sums; p, dp and ds in float; p and ds
// are rounded to half for the products with dout, k and q (ds before the scale, so that the loss scale
// has to keep it above 6e-8); results are scaled and rounded once, dprefix stays float.

#if __CUDA_ARCH__ >= 800
constexpr u32 STAGES = 2;
#else
constexpr u32 STAGES = 1;
#endif

// Rows of the tiles that pass by while 64 rows stay.
constexpr u32 PASSING_ROWS = 32;

// Visits steps 0 .. count: `load(n, stage)` starts the copies of step n, `use(n, stage)` runs when they
// are there. With two stages the copies of the next step run beside `use`.
template <class Load, class Use> DEVICE void pass_by(u32 count, Load load, Use use) {
    if (STAGES == 2) {
        load(0, 0);
        cp_async_commit();
        for (u32 n = 0; n < count; n++) {
            cp_async_wait<0>();
            __syncthreads();
            if (n + 1 < count) load(n + 1, (n + 1) & 1);
            cp_async_commit();
            use(n, n & 1);
        }
    } else {
        for (u32 n = 0; n < count; n++) {
            load(n, 0);
            __syncthreads();
            use(n, 0);
            __syncthreads();
        }
    }
}

// delta[t, n] = dout[t, n]·out[t, n]. A warp per row of D; float sums. Bound by memory.
KERNEL __launch_bounds__(256) attention_delta(float* delta, const half* dout, const half* out, u32 rows, u32 head_dim) {
    const u32 row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
    if (row >= rows) return;
    const half* a = dout + (u64)row * head_dim;
    const half* b = out + (u64)row * head_dim;
    float sum = 0.0f;
    if (head_dim % 8 == 0) {
        for (u32 d = lane * 8; d < head_dim; d += 256) {
            float x[8], y[8];
            load8(x, a + d);
            load8(y, b + d);
#pragma unroll
            for (u32 i = 0; i < 8; i++) sum += x[i] * y[i];
        }
    } else {
        for (u32 d = lane; d < head_dim; d += 32) sum += to_float(a[d]) * to_float(b[d]);
    }
    sum = warp_sum(sum);
    if (lane == 0) delta[row] = sum;
}

// Gradient of the queries. 64 queries of one head per block, 16 per warp; their fragments and those of
// dout stay in registers. Keys and values pass by, 32 at a time, prefix first, as far as the block sees.
// Static shared memory: keys and values of one tile (sm_75) or of two: 34 KiB with D = 128.
// Bound by tensor cores.
template <u32 WIDTH>
DEVICE void attention_backward_query(half* dqkv, const half* dout, const float* lse, const float* delta, const half* qkv,
                                     const half* prefix, const Span* spans, const Tile* tiles, const AttentionShape& shape) {
    constexpr u32 KEYS = PASSING_ROWS;
    constexpr u32 PLACE = KEYS * pitch(WIDTH);
    __shared__ __align__(16) half shared[STAGES * 2 * PLACE];

    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.sequence];
    const u32 head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads);
    const u32 first = tile.index * TILE_ROWS;
    const u32 own_row = threadIdx.x / 32 * WARP_ROWS;
    const KeyValue rows = key_value_of(qkv, prefix, shape, span, tile.sequence, kv_head);

    // The queries and then dout pass through the place of the first keys and values.
    u32 queries[WIDTH / 16][4], douts[WIDTH / 16][4];
    auto fetch = [&](u32(&fragments)[WIDTH / 16][4], Rows<const half> source) {
        load_tile<WIDTH, TILE_ROWS>(shared, source, first, shape.head_dim);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < WIDTH / 16; k++) load_a<WIDTH>(fragments[k], shared, own_row, 16 * k);
        __syncthreads();
    };
    fetch(queries, rows_of(qkv, shape.query, head, span.q_start, span.q_len));
    fetch(douts, packed_rows(dout, shape, head, span.q_start, span.q_len));

    u32 seen[2];
    float minus[2], own_delta[2];
#pragma unroll
    for (u32 half_row = 0; half_row < 2; half_row++) {
        const u32 i = first + own_row + result_row(2 * half_row);
        const u64 at = (u64)(span.q_start + i) * shape.heads + head;
        seen[half_row] = visible(span, i);
        minus[half_row] = i < span.q_len ? -lse[at] * LOG2_E : -INFINITE;
        own_delta[half_row] = i < span.q_len ? delta[at] : 0.0f;
    }
    const u32 end = first + TILE_ROWS < span.q_len ? first + TILE_ROWS : span.q_len;
    const u32 prefix_tiles = ceil_div(shape.prefix_len, KEYS);
    const u32 seen_by_all = visible(span, first), seen_by_warp = visible_to_warp(span, first + own_row);
    const float factor = shape.scale * LOG2_E;
    float sums[WIDTH / 8][4];
    set_zero(sums);

    auto load = [&](u32 n, u32 stage) {
        const bool in_prefix = n < prefix_tiles;
        const u32 first_key = (in_prefix ? n : n - prefix_tiles) * KEYS;
        half* place = shared + stage * 2 * PLACE;
        load_tile<WIDTH, KEYS>(place, either(in_prefix, rows.prefix_key, rows.key), first_key, shape.head_dim);
        load_tile<WIDTH, KEYS>(place + PLACE, either(in_prefix, rows.prefix_value, rows.value), first_key, shape.head_dim);
    };
    auto use = [&](u32 n, u32 stage) {
        const bool in_prefix = n < prefix_tiles;
        const u32 first_key = (in_prefix ? n : n - prefix_tiles) * KEYS;
        // A warp has nothing to do with keys that none of its queries sees.
        if (seen_by_warp <= (in_prefix ? 0 : first_key)) return;
        const half* keys = shared + stage * 2 * PLACE;
        const half* values = keys + PLACE;
        float scores[KEYS / 8][4], dp[KEYS / 8][4];
        set_zero(scores);
        set_zero(dp);
        multiply_by_rows<WIDTH>(scores, queries, keys);
        multiply_by_rows<WIDTH>(dp, douts, values);

        const bool masked = first_key + KEYS > (in_prefix ? shape.prefix_len : seen_by_all);
#pragma unroll
        for (u32 i = 0; i < KEYS / 8; i++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                float p = exp2f(scores[i][c] * factor + minus[c >> 1]);
                if (masked && first_key + result_column(i, c) >= (in_prefix ? shape.prefix_len : seen[c >> 1])) p = 0.0f;
                dp[i][c] = p * (dp[i][c] - own_delta[c >> 1]);
            }
        multiply_by_columns<WIDTH>(sums, dp, keys);
    };
    pass_by(prefix_tiles + ceil_div(visible(span, end - 1), KEYS), load, use);

    __syncthreads();
    store_rows<WIDTH>(rows_of(dqkv, shape.query, head, span.q_start, span.q_len), first + own_row, shape.head_dim, sums, shape.scale,
                      shape.scale, shared + own_row * pitch(WIDTH));
}

// Gradient of the keys and values, and of the prefix. 64 keys of one key/value head per block, 16 per
// warp; they stay in shared memory. The queries that see one of them pass by with their dout, 32 at a
// time, head after head of the group. Scores are computed transposed (a key per row), so that p and ds
// come out as the left operands of the products that follow.
// Dynamic shared memory: keys and values, and queries and dout of one tile (sm_75) or of two, with
// their lse and delta: 51 KiB (sm_75) or 69 KiB with D = 128, 27 or 36 KiB with D = 64.
// Bound by tensor cores.
template <u32 WIDTH>
DEVICE void attention_backward_key(half* dqkv, float* dprefix, const half* dout, const float* lse, const float* delta, const half* qkv,
                                   const half* prefix, const Span* spans, const Tile* tiles, const AttentionShape& shape) {
    constexpr u32 QUERIES = PASSING_ROWS;
    constexpr u32 PLACE = QUERIES * pitch(WIDTH);
    // Queries whose scores are held at once: with all of them D = 128 does not fit the registers of sm_75.
    constexpr u32 AT_ONCE = WIDTH > 96 && STAGES == 1 ? 16 : QUERIES;
    DYNAMIC_SHARED(half, shared);
    half* const keys = shared;
    half* const values = keys + TILE_ROWS * pitch(WIDTH);
    half* const passing = values + TILE_ROWS * pitch(WIDTH);
    float* const statistics = reinterpret_cast<float*>(passing + STAGES * 2 * PLACE);

    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.sequence];
    const u32 kv_head = blockIdx.y, group = shape.heads / shape.kv_heads;
    const u32 prefix_tiles = ceil_div(shape.prefix_len, TILE_ROWS);
    const bool in_prefix = tile.index < prefix_tiles;
    const u32 first = (in_prefix ? tile.index : tile.index - prefix_tiles) * TILE_ROWS;
    const u32 own_row = threadIdx.x / 32 * WARP_ROWS;
    const KeyValue rows = key_value_of(qkv, prefix, shape, span, tile.sequence, kv_head);
    load_tile<WIDTH, TILE_ROWS>(keys, either(in_prefix, rows.prefix_key, rows.key), first, shape.head_dim);
    load_tile<WIDTH, TILE_ROWS>(values, either(in_prefix, rows.prefix_value, rows.value), first, shape.head_dim);

    const u32 first_query = in_prefix ? 0 : first_observer(span, first) / QUERIES * QUERIES;
    const u32 query_tiles = ceil_div(span.q_len - first_query, QUERIES);
    const float factor = shape.scale * LOG2_E;
    float dkeys[WIDTH / 8][4], dvalues[WIDTH / 8][4];
    set_zero(dkeys);
    set_zero(dvalues);

    auto load = [&](u32 n, u32 stage) {
        const u32 head = kv_head * group + n / query_tiles, query = first_query + n % query_tiles * QUERIES;
        half* place = passing + stage * 2 * PLACE;
        load_tile<WIDTH, QUERIES>(place, rows_of(qkv, shape.query, head, span.q_start, span.q_len), query, shape.head_dim);
        load_tile<WIDTH, QUERIES>(place + PLACE, packed_rows(dout, shape, head, span.q_start, span.q_len), query, shape.head_dim);
        // -lse / ln 2 of each query, then its delta; a query behind the last has p = 0.
        if (threadIdx.x < 2 * QUERIES) {
            const u32 i = query + threadIdx.x % QUERIES;
            const u64 at = (u64)(span.q_start + i) * shape.heads + head;
            const bool of_lse = threadIdx.x < QUERIES;
            float value = of_lse ? -INFINITE : 0.0f;
            if (i < span.q_len) value = of_lse ? -lse[at] * LOG2_E : delta[at];
            statistics[stage * 2 * QUERIES + threadIdx.x] = value;
        }
    };
    auto use = [&](u32 n, u32 stage) {
        const u32 query = first_query + n % query_tiles * QUERIES;
        // A warp has nothing to do with queries that see none of its keys.
        const u32 last = query + QUERIES < span.q_len ? query + QUERIES : span.q_len;
        if (first + own_row >= (in_prefix ? shape.prefix_len : visible(span, last - 1))) return;
        const bool masked = first + TILE_ROWS > (in_prefix ? shape.prefix_len : visible(span, query));
#pragma unroll 1
        for (u32 part = 0; part < QUERIES; part += AT_ONCE) {
            const half* queries = passing + stage * 2 * PLACE + part * pitch(WIDTH);
            const half* douts = queries + PLACE;
            const float* minus = statistics + stage * 2 * QUERIES + part;
            float p[AT_ONCE / 8][4], dp[AT_ONCE / 8][4];
            set_zero(p);
            set_zero(dp);
            multiply_rows<WIDTH>(p, keys, own_row, queries);
            multiply_rows<WIDTH>(dp, values, own_row, douts);
#pragma unroll
            for (u32 i = 0; i < AT_ONCE / 8; i++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    const u32 column = result_column(i, c), row = first + own_row + result_row(c);
                    p[i][c] = exp2f(p[i][c] * factor + minus[column]);
                    if (masked && row >= (in_prefix ? shape.prefix_len : visible(span, query + part + column))) p[i][c] = 0.0f;
                    dp[i][c] = p[i][c] * (dp[i][c] - minus[QUERIES + column]);
                }
            multiply_by_columns<WIDTH>(dvalues, p, douts);
            multiply_by_columns<WIDTH>(dkeys, dp, queries);
        }
    };
    pass_by(group * query_tiles, load, use);

    __syncthreads();
    if (in_prefix) {
        const u64 of_sequence = 2 * (u64)shape.prefix_len * shape.kv_heads * shape.head_dim;
        const Rows<float> dkey_rows = prefix_rows(dprefix, shape, of_sequence, tile.sequence, 0, kv_head);
        const Rows<float> dvalue_rows = prefix_rows(dprefix, shape, of_sequence, tile.sequence, 1, kv_head);
#pragma unroll
        for (u32 n = 0; n < WIDTH / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                const u32 row = first + own_row + result_row(c), column = result_column(n, c);
                if (row < shape.prefix_len && column < shape.head_dim) {
                    dkey_rows.first[row * dkey_rows.step + column] = dkeys[n][c] * shape.scale;
                    dvalue_rows.first[row * dvalue_rows.step + column] = dvalues[n][c];
                }
            }
    } else {
        half* room = shared + own_row * pitch(WIDTH);
        store_rows<WIDTH>(rows_of(dqkv, shape.key, kv_head, span.kv_start, span.kv_len), first + own_row, shape.head_dim, dkeys,
                          shape.scale, shape.scale, room);
        store_rows<WIDTH>(rows_of(dqkv, shape.value, kv_head, span.kv_start, span.kv_len), first + own_row, shape.head_dim, dvalues,
                          1.0f, 1.0f, room);
    }
}

#define ATTENTION_BACKWARD(WIDTH)                                                                                              \
    KERNEL __launch_bounds__(ATTENTION_THREADS)                                                                                \
    attention_backward_query_##WIDTH(half* dqkv, const half* dout, const float* lse, const float* delta, const half* qkv,      \
                                     const half* prefix, const Span* spans, const Tile* tiles, AttentionShape shape) {         \
        attention_backward_query<WIDTH>(dqkv, dout, lse, delta, qkv, prefix, spans, tiles, shape);                             \
    }                                                                                                                          \
    KERNEL __launch_bounds__(ATTENTION_THREADS)                                                                                \
    attention_backward_key_##WIDTH(half* dqkv, float* dprefix, const half* dout, const float* lse, const float* delta,         \
                                   const half* qkv, const half* prefix, const Span* spans, const Tile* tiles,                  \
                                   AttentionShape shape) {                                                                     \
        attention_backward_key<WIDTH>(dqkv, dprefix, dout, lse, delta, qkv, prefix, spans, tiles, shape);                      \
    }
ATTENTION_BACKWARD(16)
ATTENTION_BACKWARD(32)
ATTENTION_BACKWARD(64)
ATTENTION_BACKWARD(96)
ATTENTION_BACKWARD(128)

// The same in float throughout, for heads that tensor cores cannot take (attention_forward_plain). A
// warp per query: a lane per key for ds, a lane per column for the sums.
KERNEL __launch_bounds__(ATTENTION_THREADS)
attention_backward_query_plain(half* dqkv, const half* dout, const float* lse, const float* delta, const half* qkv,
                               const half* prefix, const Span* spans, const Tile* tiles, AttentionShape shape) {
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.sequence];
    const u32 head = blockIdx.y, kv_head = head / (shape.heads / shape.kv_heads), lane = threadIdx.x & 31;
    const KeyValue rows = key_value_of(qkv, prefix, shape, span, tile.sequence, kv_head);
    const Rows<const half> queries = rows_of(qkv, shape.query, head, span.q_start, span.q_len);
    const Rows<const half> douts = packed_rows(dout, shape, head, span.q_start, span.q_len);
    const Rows<half> dqueries = rows_of(dqkv, shape.query, head, span.q_start, span.q_len);

    for (u32 row = threadIdx.x / 32; row < TILE_ROWS; row += ATTENTION_THREADS / 32) {
        const u32 i = tile.index * TILE_ROWS + row;
        if (i >= span.q_len) break;
        const u64 at = (u64)(span.q_start + i) * shape.heads + head;
        float sums[PLAIN_DIM / 32] = {};
        auto visit = [&](Rows<const half> keys, Rows<const half> values, u32 len) {
            for (u32 first = 0; first < len; first += 32) {
                const u32 count = len - first < 32 ? len - first : 32, k = first + lane;
                float ds = 0.0f;
                if (lane < count) {
                    const float score = dot_rows(queries.first + i * queries.step, keys.first + k * keys.step, shape.head_dim);
                    const float dp = dot_rows(douts.first + i * douts.step, values.first + k * values.step, shape.head_dim);
                    ds = expf(shape.scale * score - lse[at]) * (dp - delta[at]);
                }
                add_rows(sums, ds, keys.first + first * keys.step, keys.step, count, shape.head_dim);
            }
        };
        visit(rows.prefix_key, rows.prefix_value, shape.prefix_len);
        visit(rows.key, rows.value, visible(span, i));
        store_plain(dqueries.first + i * dqueries.step, sums, shape.scale, shape.head_dim);
    }
}

// A warp per key: a lane per query for p and ds, a lane per column for the sums.
KERNEL __launch_bounds__(ATTENTION_THREADS)
attention_backward_key_plain(half* dqkv, float* dprefix, const half* dout, const float* lse, const float* delta, const half* qkv,
                             const half* prefix, const Span* spans, const Tile* tiles, AttentionShape shape) {
    const Tile tile = tiles[blockIdx.x];
    const Span span = spans[tile.sequence];
    const u32 kv_head = blockIdx.y, group = shape.heads / shape.kv_heads, lane = threadIdx.x & 31;
    const u32 prefix_tiles = ceil_div(shape.prefix_len, TILE_ROWS);
    const bool in_prefix = tile.index < prefix_tiles;
    const u32 first = (in_prefix ? tile.index : tile.index - prefix_tiles) * TILE_ROWS;
    const KeyValue rows = key_value_of(qkv, prefix, shape, span, tile.sequence, kv_head);
    const Rows<const half> keys = either(in_prefix, rows.prefix_key, rows.key);
    const Rows<const half> values = either(in_prefix, rows.prefix_value, rows.value);

    for (u32 row = threadIdx.x / 32; row < TILE_ROWS; row += ATTENTION_THREADS / 32) {
        const u32 k = first + row;
        if (k >= keys.len) break;
        float dkey[PLAIN_DIM / 32] = {}, dvalue[PLAIN_DIM / 32] = {};
        for (u32 head = kv_head * group; head < (kv_head + 1) * group; head++) {
            const Rows<const half> queries = rows_of(qkv, shape.query, head, span.q_start, span.q_len);
            const Rows<const half> douts = packed_rows(dout, shape, head, span.q_start, span.q_len);
            for (u32 query = in_prefix ? 0 : first_observer(span, k); query < span.q_len; query += 32) {
                const u32 count = span.q_len - query < 32 ? span.q_len - query : 32, i = query + lane;
                float p = 0.0f, ds = 0.0f;
                if (lane < count) {
                    const u64 at = (u64)(span.q_start + i) * shape.heads + head;
                    const float score = dot_rows(queries.first + i * queries.step, keys.first + k * keys.step, shape.head_dim);
                    const float dp = dot_rows(douts.first + i * douts.step, values.first + k * values.step, shape.head_dim);
                    p = expf(shape.scale * score - lse[at]);
                    ds = p * (dp - delta[at]);
                }
                add_rows(dkey, ds, queries.first + query * queries.step, queries.step, count, shape.head_dim);
                add_rows(dvalue, p, douts.first + query * douts.step, douts.step, count, shape.head_dim);
            }
        }
        if (in_prefix) {
            const u64 of_sequence = 2 * (u64)shape.prefix_len * shape.kv_heads * shape.head_dim;
            const Rows<float> dkeys = prefix_rows(dprefix, shape, of_sequence, tile.sequence, 0, kv_head);
            const Rows<float> dvalues = prefix_rows(dprefix, shape, of_sequence, tile.sequence, 1, kv_head);
            store_plain(dkeys.first + k * dkeys.step, dkey, shape.scale, shape.head_dim);
            store_plain(dvalues.first + k * dvalues.step, dvalue, 1.0f, shape.head_dim);
        } else {
            const Rows<half> dkeys = rows_of(dqkv, shape.key, kv_head, span.kv_start, span.kv_len);
            const Rows<half> dvalues = rows_of(dqkv, shape.value, kv_head, span.kv_start, span.kv_len);
            store_plain(dkeys.first + k * dkeys.step, dkey, shape.scale, shape.head_dim);
            store_plain(dvalues.first + k * dvalues.step, dvalue, 1.0f, shape.head_dim);
        }
    }
}
