//! Sums over tensors and AdamW.

use mp_train::backend::{AdamwStep, Backend};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers};

/// Sums are cut at 8192.
const LENGTHS: [usize; 7] = [1, 3, 65, 97, 8_192, 8_193, 40_001];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(10);
    for len in LENGTHS {
        sums(b, check, &mut numbers, len);
        for weight_decay in [0.0, 0.1] {
            adamw(b, check, &mut numbers, len, weight_decay);
        }
    }
}

fn sums<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize) {
    let x = Buf::<B, f32>::of(b, &numbers.values(len));
    let values = x.values();
    let (index, scale) = (2, 0.37f32);
    let one_place = |exact: Exact| vec![Exact::UNTOUCHED, Exact::UNTOUCHED, exact];

    let mut out = Buf::<B, f32>::blank(b, 5);
    check.run(b, "sum", format!("len {len}"), &[&x], || {
        b.sum(&mut out.device, index, &x.device, len)
    });
    check.expect(b, &out, || one_place(Exact::sum(values.iter().copied())));

    let mut out = Buf::<B, f32>::blank(b, 5);
    check.run(b, "sum_squares", format!("len {len}"), &[&x], || {
        b.sum_squares(&mut out.device, index, &x.device, len, scale)
    });
    check.expect(b, &out, || {
        one_place(Exact::sum(
            values.iter().map(|x| (f64::from(scale) * x).powi(2)),
        ))
    });
}

/// Several steps, each with a new gradient, against a state that is carried along in f64.
fn adamw<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    len: usize,
    weight_decay: f32,
) {
    const STEPS: i32 = 6;
    let (beta1, beta2) = (0.9f32, 0.999f32);
    let mut master = Buf::<B, f32>::target(b, &numbers.values(len));
    let mut working = Act::<B>::blank(b, len);
    let mut exp_avg = Buf::<B, f32>::target(b, &vec![0.0; len]);
    let mut exp_avg_sq = Buf::<B, f32>::target(b, &vec![0.0; len]);
    let mut state: Vec<[Exact; 3]> = master
        .values()
        .into_iter()
        .map(|x| [Exact::sum([x]), Exact::sum([]), Exact::sum([])])
        .collect();
    for t in 1..=STEPS {
        let step = AdamwStep {
            learning_rate: 0.01 * t as f32,
            beta1,
            beta2,
            eps: 1e-8,
            weight_decay,
            bias_correction1: 1.0 - beta1.powi(t),
            bias_correction2: 1.0 - beta2.powi(t),
            gradient_scale: 0.125 * t as f32,
        };
        let gradient = Buf::<B, f32>::of(b, &numbers.values(len));
        let label = format!("len {len}, decay {weight_decay}, step {t}");
        check.run(b, "adamw", label, &[&gradient], || {
            b.adamw(
                &mut working.device,
                &mut master.device,
                &mut exp_avg.device,
                &mut exp_avg_sq.device,
                &gradient.device,
                step,
                len,
            )
        });
        for (state, gradient) in state.iter_mut().zip(gradient.values()) {
            *state = adamw_exact(*state, gradient, step);
        }
        let part = |index: usize| state.iter().map(|state| state[index]).collect::<Vec<_>>();
        check.expect(b, &master, || part(0));
        check.expect(b, &working, || part(0));
        check.expect(b, &exp_avg, || part(1));
        check.expect(b, &exp_avg_sq, || part(2));
    }
}

/// Master, first and second moment after a step. Magnitudes carry the noise of earlier steps along.
fn adamw_exact([master, m, v]: [Exact; 3], gradient: f64, step: AdamwStep) -> [Exact; 3] {
    let wide = f64::from;
    let g = wide(step.gradient_scale) * gradient;
    let (beta1, beta2) = (wide(step.beta1), wide(step.beta2));
    let m = Exact::new(
        beta1 * m.value + (1.0 - beta1) * g,
        beta1 * m.magnitude + (1.0 - beta1) * g.abs(),
    );
    let v = Exact::new(
        beta2 * v.value + (1.0 - beta2) * g * g,
        beta2 * v.magnitude + (1.0 - beta2) * g * g,
    );
    let (c1, c2) = (wide(step.bias_correction1), wide(step.bias_correction2));
    let rate = wide(step.learning_rate);
    let decay = 1.0 - rate * wide(step.weight_decay);
    let denominator = (v.value / c2).sqrt() + wide(step.eps);
    let master = Exact::new(
        master.value * decay - rate * (m.value / c1) / denominator,
        master.magnitude + rate * (m.magnitude / c1) / denominator,
    );
    [master, m, v]
}
