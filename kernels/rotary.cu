#include "common.cuh"

// Two-dimensional rotary embedding, in place (Su et al. 2021; one rotation for each half of a head).
//
//   low' = low cos - high sin,  high' = high cos + low sin,  low = x[.., j], high = x[.., j + D/4]
//
// in the first half of a query or key head by the angle of `position`, in the second by that of
// `block_position`. x half, rows of `row` elements; heads of width D at `query_offset + i * query_stride`
// and `key_offset + i * key_stride`; cos, sin [positions, D/4] float; position, block_position [T].
// `direction` is 1, or -1 to undo the rotation, which is also its gradient.
//
// Precision: float, each element rounded once. Geometry: a thread takes WIDTH neighbouring pairs, in a
// grid-stride loop over T rows, N + G heads, two halves and D / 4 / WIDTH places. Bound by the read and
// write of x.

struct Rotary {
    u32 rows, row, head_dim;
    u32 heads, query_offset, query_stride;
    u32 kv_heads, key_offset, key_stride;
    float direction;
};

template <u32 WIDTH>
DEVICE void rotate(half* x, const float* cos, const float* sin, const u32* position, const u32* block_position, const Rotary& shape) {
    const u32 quarter = shape.head_dim / 4, places = quarter / WIDTH, heads = shape.heads + shape.kv_heads;
    const u64 count = (u64)shape.rows * heads * 2 * places;
    for (u64 at = grid_first(); at < count; at += grid_step()) {
        const u32 j = (u32)(at % places) * WIDTH, second = (u32)(at / places % 2);
        const u32 head = (u32)(at / places / 2 % heads), row = (u32)(at / places / 2 / heads);
        const u32 place = head < shape.heads ? shape.query_offset + head * shape.query_stride
                                             : shape.key_offset + (head - shape.heads) * shape.key_stride;
        half* const low = x + (u64)row * shape.row + place + second * 2 * quarter + j;
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
        for (u32 i = 0; i < WIDTH; i++) {
            const float c = cos[angle + i], s = shape.direction * sin[angle + i];
            const float turned = a[i] * c - b[i] * s;
            b[i] = b[i] * c + a[i] * s;
            a[i] = turned;
        }
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
