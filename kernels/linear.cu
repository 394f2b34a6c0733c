// What a linear layer needs beside the products of cuBLASLt.
#include "common.cuh"

// dbias[o] += sum over t of dout[t, o], rows ascending. dout [T, O], dbias [O], summed in f32.
// A thread per column, so that a warp reads neighbouring values; grid ceil(O / blockDim).
// Bound by the read of dout.
DEVICE float value(half x) { return to_float(x); }
DEVICE float value(float x) { return x; }

template <class T> DEVICE void add_columns(float* dbias, const T* dout, u32 rows, u32 cols) {
    const u64 col = grid_first();
    if (col >= cols) return;
    float sum = dbias[col];
    for (u64 row = 0; row < rows; row++) sum += value(dout[row * cols + col]);
    dbias[col] = sum;
}

KERNEL __launch_bounds__(128) bias_gradient_f16(float* dbias, const half* dout, u32 rows, u32 cols) {
    add_columns(dbias, dout, rows, cols);
}

KERNEL __launch_bounds__(128) bias_gradient_f32(float* dbias, const float* dout, u32 rows, u32 cols) {
    add_columns(dbias, dout, rows, cols);
}
