#include "common.cuh"

// Rotary embedding, in place (Su et al. 2021): a pair (a, b) of elements of a query or key head becomes
//
//   a' = a cos - b sin,  b' = b cos + a sin
//
// x half, rows of `row` elements; heads at `query_offset + i * query_stride` and
// `key_offset + i * key_stride`, of which the first `width` elements are turned. `direction` is 1, or -1
// to undo the rotation, which is also its gradient.
//
// Precision: float, each element rounded once. Geometry: a grid-stride loop over T rows, N + G heads and
// the places of a thread in a head. Bound by the read and write of x.

struct Rotary {
    u32 rows, row, width;
    u32 heads, query_offset, query_stride;
    u32 kv_heads, key_offset, key_stride;
    float direction;
};

DEVICE void turn(float& a, float& b, float cos, float sin) {
    const float turned = a * cos - b * sin;
    b = b * cos + a * sin;
    a = turned;
}

// Head `head` of row `row`, queries first.
DEVICE half* head_of(half* x, u32 row, u32 head, const Rotary& shape) {
    const u32 place = head < shape.heads ? shape.query_offset + head * shape.query_stride
                                         : shape.key_offset + (head - shape.heads) * shape.key_stride;
    return x + (u64)row * shape.row + place;
}

// ---- two-dimensional
//
// One rotation for each half of a head: element j is paired with j + D/4, in the first half by the angle
// of `position`, in the second by that of `block_position`. width = D; cos, sin [positions, D/4] float;
// position, block_position [T]. A thread takes WIDTH neighbouring pairs of a half.
template <u32 WIDTH>
DEVICE void rotate(half* x, const float* cos, const float* sin, const u32* position, const u32* block_position, const Rotary& shape) {
    const u32 quarter = shape.width / 4, places = quarter / WIDTH, heads = shape.heads + shape.kv_heads;
    const u64 count = (u64)shape.rows * heads * 2 * places;
    for (u64 at = grid_first(); at < count; at += grid_step()) {
        const u32 j = (u32)(at % places) * WIDTH, second = (u32)(at / places % 2);
        const u32 head = (u32)(at / places / 2 % heads), row = (u32)(at / places / 2 / heads);
        half* const low = head_of(x, row, head, shape) + second * 2 * quarter + j;
        half* const high = low + quarter;
        const u64 angle = (u64)(second ? block_position : position)[row] * quarter + j;
        float a[WIDTH], b[WIDTH];
        if constexpr (WIDTH == 8) {
            load8(a, low);
            load8(b, high);
        } else {
            a[0] = to_float(*low);
            b[0] = to_float(*high);
        }
#pragma unroll
        for (u32 i = 0; i < WIDTH; i++) turn(a[i], b[i], cos[angle + i], shape.direction * sin[angle + i]);
        if constexpr (WIDTH == 8) {
            store8(low, a);
            store8(high, b);
        } else {
            *low = to_half(a[0]);
            *high = to_half(b[0]);
        }
    }
}

// Where D / 4, rows and places of heads are multiples of 8.
KERNEL __launch_bounds__(256)
rotary_by_8(half* x, const float* cos, const float* sin, const u32* position, const u32* block_position, Rotary shape) {
    rotate<8>(x, cos, sin, position, block_position, shape);
}

KERNEL __launch_bounds__(256)
rotary_by_1(half* x, const float* cos, const float* sin, const u32* position, const u32* block_position, Rotary shape) {
    rotate<1>(x, cos, sin, position, block_position, shape);
}

// ---- interleaved
//
// Element 2j is paired with 2j + 1 in the first `width` elements of a head. cos, sin [positions, width/2]
// float; position [T]. A thread takes PAIRS neighbouring pairs.
template <u32 PAIRS>
DEVICE void rotate_interleaved(half* x, const float* cos, const float* sin, const u32* position, const Rotary& shape) {
    const u32 places = shape.width / 2 / PAIRS, heads = shape.heads + shape.kv_heads;
    const u64 count = (u64)shape.rows * heads * places;
    for (u64 at = grid_first(); at < count; at += grid_step()) {
        const u32 j = (u32)(at % places) * PAIRS;
        const u32 head = (u32)(at / places % heads), row = (u32)(at / places / heads);
        half* const pairs = head_of(x, row, head, shape) + 2 * j;
        const u64 angle = (u64)position[row] * (shape.width / 2) + j;
        float v[2 * PAIRS];
        if constexpr (PAIRS == 4) {
            load8(v, pairs);
        } else {
            v[0] = to_float(pairs[0]);
            v[1] = to_float(pairs[1]);
        }
#pragma unroll
        for (u32 i = 0; i < PAIRS; i++) turn(v[2 * i], v[2 * i + 1], cos[angle + i], shape.direction * sin[angle + i]);
        if constexpr (PAIRS == 4) {
            store8(pairs, v);
        } else {
            pairs[0] = to_half(v[0]);
            pairs[1] = to_half(v[1]);
        }
    }
}

// Where `width`, rows and places of heads are multiples of 8.
KERNEL __launch_bounds__(256)
rotary_interleaved_by_8(half* x, const float* cos, const float* sin, const u32* position, Rotary shape) {
    rotate_interleaved<4>(x, cos, sin, position, shape);
}

KERNEL __launch_bounds__(256)
rotary_interleaved_by_2(half* x, const float* cos, const float* sin, const u32* position, Rotary shape) {
    rotate_interleaved<1>(x, cos, sin, position, shape);
}
