//! GELU, SwiGLU, tanh, residual sums, casts.

use multiversion::multiversion;

use super::reduce;
use super::threads::Threads;
use crate::backend::Element;

const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

pub fn gelu<E: Element>(threads: &Threads, out: &mut [E], x: &[E]) {
    threads.pieces(out, |start, out| gelu_piece(out, &x[start..]));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn gelu_piece<E: Element>(out: &mut [E], x: &[E]) {
    for (out, x) in out.iter_mut().zip(x) {
        let x = x.to_f32();
        let t = reduce::tanh(GELU_SCALE * x * (1.0 + GELU_CUBIC * x * x));
        *out = E::from_f32(0.5 * x * (1.0 + t));
    }
}

pub fn gelu_backward<E: Element>(threads: &Threads, dx: &mut [E], x: &[E]) {
    threads.pieces(dx, |start, dx| gelu_backward_piece(dx, &x[start..]));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn gelu_backward_piece<E: Element>(dx: &mut [E], x: &[E]) {
    for (dx, x) in dx.iter_mut().zip(x) {
        let x = x.to_f32();
        let t = reduce::tanh(GELU_SCALE * x * (1.0 + GELU_CUBIC * x * x));
        let slope = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x);
        let derivative = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope;
        *dx = E::from_f32(dx.to_f32() * derivative);
    }
}

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + reduce::exp(-x))
}

pub fn swiglu<E: Element>(threads: &Threads, out: &mut [E], x: &[E], inner: usize) {
    threads.rows(out, inner, |row, out| {
        swiglu_row(out, &x[2 * row * inner..][..2 * inner]);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn swiglu_row<E: Element>(out: &mut [E], x: &[E]) {
    let (gate, up) = x.split_at(out.len());
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        let gate = gate.to_f32();
        *out = E::from_f32(gate * sigmoid(gate) * up.to_f32());
    }
}

pub fn swiglu_backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: &[E],
    x: &[E],
    inner: usize,
) {
    threads.rows(dx, 2 * inner, |row, dx| {
        let x = &x[2 * row * inner..][..2 * inner];
        swiglu_backward_row(dx, &dout[row * inner..][..inner], x);
    });
}

/// `d silu(a) / da = s (1 + a (1 - s))` with `s = sigmoid(a)`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn swiglu_backward_row<E: Element>(dx: &mut [E], dout: &[E], x: &[E]) {
    let (dgate, dup) = dx.split_at_mut(dout.len());
    let (gate, up) = x.split_at(dout.len());
    let gradients = dgate.iter_mut().zip(dup).zip(dout);
    for (((dgate, dup), dout), (gate, up)) in gradients.zip(gate.iter().zip(up)) {
        let (gate, up, dout) = (gate.to_f32(), up.to_f32(), dout.to_f32());
        let s = sigmoid(gate);
        *dgate = E::from_f32(dout * up * s * (1.0 + gate * (1.0 - s)));
        *dup = E::from_f32(dout * gate * s);
    }
}

pub fn tanh(threads: &Threads, x: &mut [f32]) {
    threads.pieces(x, |_, x| {
        for x in x {
            *x = x.tanh();
        }
    });
}

pub fn tanh_backward(threads: &Threads, dx: &mut [f32], out: &[f32]) {
    threads.pieces(dx, |start, dx| {
        for (dx, out) in dx.iter_mut().zip(&out[start..]) {
            *dx *= 1.0 - out * out;
        }
    });
}

pub fn residual<E: Element>(threads: &Threads, out: &mut [f32], x: &[E], alpha: f32, branch: &[E]) {
    threads.pieces(out, |start, out| {
        residual_piece(out, &x[start..], alpha, &branch[start..]);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn residual_piece<E: Element>(out: &mut [f32], x: &[E], alpha: f32, branch: &[E]) {
    for ((out, x), branch) in out.iter_mut().zip(x).zip(branch) {
        *out = alpha * x.to_f32() + branch.to_f32();
    }
}

pub fn residual_sum<E: Element>(threads: &Threads, out: &mut [f32], x: &[f32], branch: &[E]) {
    threads.pieces(out, |start, out| {
        residual_sum_piece(out, &x[start..], &branch[start..]);
    });
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn residual_sum_piece<E: Element>(out: &mut [f32], x: &[f32], branch: &[E]) {
    for ((out, x), branch) in out.iter_mut().zip(x).zip(branch) {
        *out = x + branch.to_f32();
    }
}

pub fn cast<E: Element>(threads: &Threads, out: &mut [E], x: &[f32]) {
    threads.pieces(out, |start, out| cast_piece(out, &x[start..]));
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn cast_piece<E: Element>(out: &mut [E], x: &[f32]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = E::from_f32(x);
    }
}

pub fn add(threads: &Threads, out: &mut [f32], x: &[f32]) {
    threads.pieces(out, |start, out| {
        for (out, &x) in out.iter_mut().zip(&x[start..]) {
            *out += x;
        }
    });
}
