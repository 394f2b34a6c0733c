//! Sums over tensors and AdamW.

use mp_train::backend::{AdamwStep, AdamwTensor, Backend, SumOf};

use crate::buffer::{Act, Buf, Input};
use crate::check::Check;
use crate::numbers::{Exact, Numbers};

/// Sums are cut at 8192.
const LENGTHS: [usize; 7] = [1, 3, 65, 97, 8_192, 8_193, 40_001];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(10);
    for len in LENGTHS {
        sum(b, check, &mut numbers, len);
        sums_of_squares(b, check, &mut numbers, &[(2, len)]);
        for weight_decay in [0.0, 0.1] {
            adamw(b, check, &mut numbers, &[(len, weight_decay)]);
        }
    }
    // Many tensors at once, their places in another order than they are; then others through the same
    // op, so that nothing is kept of the first ones.
    let mut lengths = LENGTHS;
    for _ in 0..2 {
        let terms: Vec<_> = (0..7).map(|i| ((3 * i + 1) % 7, lengths[i])).collect();
        sums_of_squares(b, check, &mut numbers, &terms);
        let decays = [0.1, 0.0, 0.02].into_iter().cycle();
        adamw(
            b,
            check,
            &mut numbers,
            &lengths.into_iter().zip(decays).collect::<Vec<_>>(),
        );
        lengths.reverse();
    }
    check.run(b, "adamw", "no tensor".to_owned(), &[], || {
        b.adamw(&mut [], step_of(1))
    });
}

fn sum<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize) {
    let x = Buf::<B, f32>::of(b, &numbers.values(len));
    let mut out = Buf::<B, f32>::blank(b, 5);
    check.run(b, "sum", format!("len {len}"), &[&x], || {
        b.sum(&mut out.device, 2, &x.device, len)
    });
    let exact = Exact::sum(x.values());
    check.expect(b, &out, || vec![Exact::UNTOUCHED, Exact::UNTOUCHED, exact]);
}

/// Terms are (place, length).
fn sums_of_squares<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    terms: &[(usize, usize)],
) {
    let scale = 0.37f32;
    let tensors: Vec<_> = terms
        .iter()
        .map(|&(_, len)| Buf::<B, f32>::of(b, &numbers.values(len)))
        .collect();
    let mut exact = vec![Exact::UNTOUCHED; 9];
    for (&(index, _), x) in terms.iter().zip(&tensors) {
        let values = x.values().into_iter();
        exact[index] = Exact::sum(values.map(|x| (f64::from(scale) * x).powi(2)));
    }
    let list: Vec<_> = terms
        .iter()
        .zip(&tensors)
        .map(|(&(index, len), x)| SumOf {
            index,
            x: &x.device,
            len,
        })
        .collect();
    let inputs: Vec<&dyn Input<B>> = tensors.iter().map(|x| x as &dyn Input<B>).collect();
    let mut out = Buf::<B, f32>::blank(b, exact.len());
    let label = format!("(place, length) {terms:?}");
    check.run(b, "sum_squares", label.clone(), &inputs, || {
        b.sum_squares(&mut out.device, &list, scale)
    });
    check.expect(b, &out, || exact.clone());

    // A sum does not depend on its neighbours.
    let mut alone = Buf::<B, f32>::blank(b, exact.len());
    check.run(b, "sum_squares", label + ", one by one", &inputs, || {
        let mut one_by_one = list.chunks(1);
        one_by_one.try_for_each(|term| b.sum_squares(&mut alone.device, term, scale))
    });
    check.expect_bits(&alone.after(b), &out.after(b));
}

fn step_of(t: i32) -> AdamwStep {
    let (beta1, beta2) = (0.9f32, 0.999f32);
    AdamwStep {
        learning_rate: 0.01 * t as f32,
        beta1,
        beta2,
        eps: 1e-8,
        bias_correction1: 1.0 - beta1.powi(t),
        bias_correction2: 1.0 - beta2.powi(t),
        gradient_scale: 0.125 * t as f32,
    }
}

/// A tensor under training, and its state in f64.
struct Trained<B: Backend> {
    master: Buf<B, f32>,
    working: Act<B>,
    exp_avg: Buf<B, f32>,
    exp_avg_sq: Buf<B, f32>,
    weight_decay: f32,
    len: usize,
    state: Vec<[Exact; 3]>,
}

impl<B: Backend> Trained<B> {
    fn new(b: &B, numbers: &mut Numbers, len: usize, weight_decay: f32) -> Self {
        let master = Buf::<B, f32>::target(b, &numbers.values(len));
        let state = master.values().into_iter();
        Trained {
            working: Act::<B>::blank(b, len),
            exp_avg: Buf::<B, f32>::target(b, &vec![0.0; len]),
            exp_avg_sq: Buf::<B, f32>::target(b, &vec![0.0; len]),
            weight_decay,
            len,
            state: state
                .map(|x| [Exact::sum([x]), Exact::sum([]), Exact::sum([])])
                .collect(),
            master,
        }
    }
}

/// Several steps, each with new gradients, against states that are carried along in f64. Tensors are
/// (length, weight decay).
fn adamw<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, tensors: &[(usize, f32)]) {
    const STEPS: i32 = 6;
    let mut trained: Vec<Trained<B>> = tensors
        .iter()
        .map(|&(len, weight_decay)| Trained::new(b, numbers, len, weight_decay))
        .collect();
    for t in 1..=STEPS {
        let step = step_of(t);
        let gradients: Vec<_> = tensors
            .iter()
            .map(|&(len, _)| Buf::<B, f32>::of(b, &numbers.values(len)))
            .collect();
        let inputs: Vec<&dyn Input<B>> = gradients.iter().map(|g| g as &dyn Input<B>).collect();
        let label = format!("(length, decay) {tensors:?}, step {t}");
        check.run(b, "adamw", label, &inputs, || {
            let mut list: Vec<_> = trained
                .iter_mut()
                .zip(&gradients)
                .map(|(tensor, gradient)| AdamwTensor {
                    working: &mut tensor.working.device,
                    master: &mut tensor.master.device,
                    exp_avg: &mut tensor.exp_avg.device,
                    exp_avg_sq: &mut tensor.exp_avg_sq.device,
                    gradient: &gradient.device,
                    weight_decay: tensor.weight_decay,
                    len: tensor.len,
                })
                .collect();
            b.adamw(&mut list, step)
        });
        for (tensor, gradient) in trained.iter_mut().zip(&gradients) {
            let Trained {
                state,
                weight_decay,
                ..
            } = tensor;
            for (state, gradient) in state.iter_mut().zip(gradient.values()) {
                *state = adamw_exact(*state, gradient, *weight_decay, step);
            }
            let part = |index: usize| tensor.state.iter().map(|state| state[index]).collect();
            check.expect(b, &tensor.master, || part(0));
            check.expect(b, &tensor.working, || part(0));
            check.expect(b, &tensor.exp_avg, || part(1));
            check.expect(b, &tensor.exp_avg_sq, || part(2));
        }
    }
}

/// Master, first and second moment after a step. Magnitudes carry the noise of earlier steps along.
fn adamw_exact(
    [master, m, v]: [Exact; 3],
    gradient: f64,
    weight_decay: f32,
    step: AdamwStep,
) -> [Exact; 3] {
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
    let decay = 1.0 - rate * wide(weight_decay);
    let denominator = (v.value / c2).sqrt() + wide(step.eps);
    let master = Exact::new(
        master.value * decay - rate * (m.value / c1) / denominator,
        master.magnitude + rate * (m.magnitude / c1) / denominator,
    );
    [master, m, v]
}
