// The sequences of a micro-batch, as `Span` of src/backend/shapes.rs.
#pragma once
#include "common.cuh"

struct Span {
    u32 q_start;         // first query row
    u32 q_len;           // queries, the last ones of the sequence
    u32 kv_start;        // first key row
    u32 kv_len;          // keys
    u32 context_length;  // keys below this index are visible to every query
};

// Index of the sequence whose queries hold row `row`; the queries of the spans are consecutive rows
// in ascending order.
DEVICE u32 span_of_row(const Span* spans, u32 count, u32 row) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (spans[middle].q_start <= row) low = middle;
        else high = middle;
    }
    return low;
}
