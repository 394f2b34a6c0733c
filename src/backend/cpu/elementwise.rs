//! GELU, SwiGLU, tanh, residual sums, casts.

use super::reduce;
use super::threads::Threads;
use crate::backend::Element;

const GELU_SCALE: f32 = 0.797_884_6;
const GELU_CUBIC: f32 = 0.044_715;

pub fn gelu<E: Element>(threads: &Threads, out: &mut [E], x: &[E]) {
    threads.pieces(out, |start, out| {
        for (out, x) in out.iter_mut().zip(&x[start..]) {
            let x = x.to_f32();
            let t = reduce::tanh(GELU_SCALE * x * (1.0 + GELU_CUBIC * x * x));
            *out = E::from_f32(0.5 * x * (1.0 + t));
        }
    });
}

pub fn gelu_backward<E: Element>(threads: &Threads, dx: &mut [E], x: &[E]) {
    threads.pieces(dx, |start, dx| {
        for (dx, x) in dx.iter_mut().zip(&x[start..]) {
            let x = x.to_f32();
            let t = reduce::tanh(GELU_SCALE * x * (1.0 + GELU_CUBIC * x * x));
            let slope = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x * x);
            let derivative = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope;
            *dx = E::from_f32(dx.to_f32() * derivative);
        }
    });
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + reduce::exp(-x))
}

pub fn swiglu<E: Element>(threads: &Threads, out: &mut [E], x: &[E], inner: usize) {
    threads.rows(out, inner, |row, out| {
        let (gate, up) = x[2 * row * inner..][..2 * inner].split_at(inner);
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            let gate = gate.to_f32();
            *out = E::from_f32(gate * sigmoid(gate) * up.to_f32());
        }
    });
}

/// `d silu(a) / da = s (1 + a (1 - s))` with `s = sigmoid(a)`.
pub fn swiglu_backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: &[E],
    x: &[E],
    inner: usize,
) {
    threads.rows(dx, 2 * inner, |row, dx| {
        let (gate, up) = x[2 * row * inner..][..2 * inner].split_at(inner);
        let (dgate, dup) = dx.split_at_mut(inner);
        let dout = &dout[row * inner..][..inner];
        for (col, dout) in dout.iter().enumerate() {
            let (gate, up, dout) = (gate[col].to_f32(), up[col].to_f32(), dout.to_f32());
            let s = sigmoid(gate);
            dgate[col] = E::from_f32(dout * up * s * (1.0 + gate * (1.0 - s)));
            dup[col] = E::from_f32(dout * gate * s);
        }
    });
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
        for ((out, x), branch) in out.iter_mut().zip(&x[start..]).zip(&branch[start..]) {
            *out = alpha * x.to_f32() + branch.to_f32();
        }
    });
}

pub fn residual_sum<E: Element>(threads: &Threads, out: &mut [f32], x: &[f32], branch: &[E]) {
    threads.pieces(out, |start, out| {
        for ((out, x), branch) in out.iter_mut().zip(&x[start..]).zip(&branch[start..]) {
            *out = x + branch.to_f32();
        }
    });
}

pub fn cast<E: Element>(threads: &Threads, out: &mut [E], x: &[f32]) {
    threads.pieces(out, |start, out| {
        for (out, &x) in out.iter_mut().zip(&x[start..]) {
            *out = E::from_f32(x);
        }
    });
}

pub fn add(threads: &Threads, out: &mut [f32], x: &[f32]) {
    threads.pieces(out, |start, out| {
        for (out, &x) in out.iter_mut().zip(&x[start..]) {
            *out += x;
        }
    });
}
