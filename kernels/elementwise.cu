// Element by element: casts, sums, GELU, SwiGLU, tanh. Computed in float, rounded at the store.
//
// Each is a struct whose `on<W>` treats W neighbouring values. Flat lists of `len` values: any grid of
// any width of at least 8 threads. All are bound by memory; a thread takes 16 bytes of the widest
// buffer at a time.
#include "pieces.cuh"

// out = x, rounded where T is half.
template <class T> struct Cast {
    T* out;
    const float* x;
    template <u32 W> METHOD void on(u64 at) const {
        float v[W];
        load(v, x + at);
        store(out + at, v);
    }
};

KERNEL __launch_bounds__(256) cast_f16(half* out, const float* x, u64 len) {
    in_pieces<4>(len, Cast<half>{out, x});
}

KERNEL __launch_bounds__(256) cast_f32(float* out, const float* x, u64 len) {
    in_pieces<4>(len, Cast<float>{out, x});
}

// out += x, in float.
struct Add {
    float* out;
    const float* x;
    template <u32 W> METHOD void on(u64 at) const {
        float sum[W], v[W];
        load(sum, out + at);
        load(v, x + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) sum[i] += v[i];
        store(out + at, sum);
    }
};

KERNEL __launch_bounds__(256) add(float* out, const float* x, u64 len) {
    in_pieces<4>(len, Add{out, x});
}

// out = alpha * x + branch: the residual sum, in float.
struct Residual {
    float* out;
    const half* x;
    float alpha;
    const half* branch;
    template <u32 W> METHOD void on(u64 at) const {
        float sum[W], v[W];
        load(sum, branch + at);
        load(v, x + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) sum[i] += alpha * v[i];
        store(out + at, sum);
    }
};

KERNEL __launch_bounds__(256) residual(
    float* out, const half* x, float alpha, const half* branch, u64 len) {
    in_pieces<4>(len, Residual{out, x, alpha, branch});
}

// out = x + branch: the residual sum of un-normed rows, in float.
struct ResidualSum {
    float* out;
    const float* x;
    const half* branch;
    template <u32 W> METHOD void on(u64 at) const {
        float sum[W], v[W];
        load(sum, x + at);
        load(v, branch + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) sum[i] += v[i];
        store(out + at, sum);
    }
};

KERNEL __launch_bounds__(256) residual_sum(
    float* out, const float* x, const half* branch, u64 len) {
    in_pieces<4>(len, ResidualSum{out, x, branch});
}

// ---- GELU in its tanh form
//
// 0.5 x (1 + tanh u) = x / (1 + e^-2u) with u = c x (1 + 0.044715 x²), c = sqrt(2 / pi): the quotient
// has no cancellation where x is negative. An overflow of e^-2u ends in the limit, 0.

#define GELU_SCALE 0.7978845608028654f
#define GELU_CUBIC 0.044715f

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

DEVICE float gelu_gate(float x) {
    return sigmoid(2.0f * GELU_SCALE * x * (1.0f + GELU_CUBIC * x * x));
}

// out = gelu(x).
struct Gelu {
    half* out;
    const half* x;
    template <u32 W> METHOD void on(u64 at) const {
        float v[W];
        load(v, x + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) v[i] *= gelu_gate(v[i]);
        store(out + at, v);
    }
};

KERNEL __launch_bounds__(256) gelu(half* out, const half* x, u64 len) {
    in_pieces<8>(len, Gelu{out, x});
}

// dx *= gelu'(x), gelu' = s + x s (1 - s) 2 du/dx with s = 1 / (1 + e^-2u).
struct GeluBackward {
    half* dx;
    const half* x;
    template <u32 W> METHOD void on(u64 at) const {
        float d[W], v[W];
        load(d, dx + at);
        load(v, x + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) {
            const float s = gelu_gate(v[i]);
            const float slope = 2.0f * GELU_SCALE * (1.0f + 3.0f * GELU_CUBIC * v[i] * v[i]);
            d[i] *= s + v[i] * slope * (s * (1.0f - s));
        }
        store(dx + at, d);
    }
};

KERNEL __launch_bounds__(256) gelu_backward(half* dx, const half* x, u64 len) {
    in_pieces<8>(len, GeluBackward{dx, x});
}

// ---- tanh, in float

// x = tanh(x).
struct Tanh {
    float* x;
    template <u32 W> METHOD void on(u64 at) const {
        float v[W];
        load(v, x + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) v[i] = tanhf(v[i]);
        store(x + at, v);
    }
};

KERNEL __launch_bounds__(256) tanh_f32(float* x, u64 len) { in_pieces<4>(len, Tanh{x}); }

// dx *= 1 - out².
struct TanhBackward {
    float* dx;
    const float* out;
    template <u32 W> METHOD void on(u64 at) const {
        float d[W], y[W];
        load(d, dx + at);
        load(y, out + at);
#pragma unroll
        for (u32 i = 0; i < W; i++) d[i] *= 1.0f - y[i] * y[i];
        store(dx + at, d);
    }
};

KERNEL __launch_bounds__(256) tanh_f32_backward(float* dx, const float* out, u64 len) {
    in_pieces<4>(len, TanhBackward{dx, out});
}

// ---- SwiGLU
//
// out = silu(a) * b, silu(a) = a s, s = 1 / (1 + e^-a), where a row of x [T, 2 F] is a, then b.
// Grid (columns, rows), both strided over; 8 columns per thread where F is a multiple of 8.

template <class Work> DEVICE void in_row_pieces(u32 rows, u32 cols, const Work& work) {
    for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
        if (cols % 8 == 0) {
            for (u64 col = grid_first() * 8; col < cols; col += grid_step() * 8) {
                work.template on<8>(row, col);
            }
        } else {
            for (u64 col = grid_first(); col < cols; col += grid_step()) {
                work.template on<1>(row, col);
            }
        }
    }
}

// out [T, F], x [T, 2 F].
struct Swiglu {
    half* out;
    const half* x;
    u32 inner;
    template <u32 W> METHOD void on(u64 row, u64 col) const {
        float a[W], b[W];
        load(a, x + 2 * row * inner + col);
        load(b, x + (2 * row + 1) * inner + col);
#pragma unroll
        for (u32 i = 0; i < W; i++) a[i] = a[i] * sigmoid(a[i]) * b[i];
        store(out + row * inner + col, a);
    }
};

KERNEL __launch_bounds__(256) swiglu(half* out, const half* x, u32 rows, u32 inner) {
    in_row_pieces(rows, inner, Swiglu{out, x, inner});
}

// da = dout b s (1 + a (1 - s)), db = dout a s. dx, x [T, 2 F], dout [T, F].
struct SwigluBackward {
    half* dx;
    const half* dout;
    const half* x;
    u32 inner;
    template <u32 W> METHOD void on(u64 row, u64 col) const {
        const u64 gate = 2 * row * inner + col, up = gate + inner;
        float a[W], b[W], d[W];
        load(a, x + gate);
        load(b, x + up);
        load(d, dout + row * inner + col);
#pragma unroll
        for (u32 i = 0; i < W; i++) {
            const float value = a[i], s = sigmoid(value);
            a[i] = d[i] * b[i] * s * (1.0f + value * (1.0f - s));
            b[i] = d[i] * value * s;
        }
        store(dx + gate, a);
        store(dx + up, b);
    }
};

KERNEL __launch_bounds__(256) swiglu_backward(
    half* dx, const half* dout, const half* x, u32 rows, u32 inner) {
    in_row_pieces(rows, inner, SwigluBackward{dx, dout, x, inner});
}
