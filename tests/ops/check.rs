//! Comparison, bookkeeping and the report.

use bytemuck::cast_slice;
use mp_train::backend::{Backend, BackendError, Element, Plain};

use crate::buffer::{Buf, Input, same_bits};
use crate::numbers::{Exact, Numbers, dot};

const EPSILON_F32: f64 = 1.0 / 8_388_608.0;

/// f32 epsilons of [`Exact::magnitude`] that a result may be off, beyond its rounding to the storage
/// type: what is left to the order of sums and to the functions of f32. The limit of an op that is
/// not listed is [`OTHER`]; copies have magnitude 0 and must be exact whatever stands here.
const NOISE: &[(&str, f64)] = &[
    ("linear", 4.0),
    ("linear_backward", 4.0),
    ("weight_gradient", 4.0),
    ("linear_gelu", 4.0),
    ("low_rank_backward", 4.0),
    ("gelu_linear_backward", 4.0),
    ("cross_entropy", 4.0),
    // Of the roundings to f16 on the way of a sum (tests/ops/half_sums.rs): six times their deviation, which is
    // 0.212 * 2^-10 of the root of the sum of the squares of what is rounded.
    ("linear/f16-sums", 10_434.0),
    ("linear_backward/f16-sums", 10_434.0),
    ("linear_gelu/f16-sums", 10_434.0),
    ("gelu_linear_backward/f16-sums", 10_434.0),
    // The noise of six steps, carried along.
    ("adamw", 6.0),
];
const OTHER: f64 = 2.0;

/// On the way to a result, f32 values below 1e-38 may be taken for 0.
const FLUSHED: f64 = 1e-35;

/// What a backend is allowed.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Exceptions from [`NOISE`], e.g. where a kernel rounds an intermediate value to f16.
    pub noise: &'static [(&'static str, f64)],
    /// Distance of a gradient from the differences of the f64 forward, by the largest gradient.
    pub difference: f64,
    /// Distance of a gradient from the differences of the backend's own forward, by the norm of the
    /// gradient; `None` where the storage type is too coarse to take differences of.
    pub own_difference: Option<f64>,
}

impl Tolerance {
    pub const F32: Tolerance = Tolerance {
        noise: &[],
        difference: 5e-6,
        own_difference: Some(2e-4),
    };
    pub const F16: Tolerance = Tolerance {
        noise: &[],
        difference: 2e-3,
        own_difference: None,
    };
    /// As [`Tolerance::F16`], but tensor cores take the probabilities of attention, and the gradients of
    /// its scores, rounded to f16: off by 2^-11 of each, which is 4096 epsilons of f32. The magnitudes
    /// of the forward op count each term twice.
    pub const CUDA: Tolerance = Tolerance {
        noise: &[("attention", 2048.0), ("attention_backward", 4096.0)],
        ..Tolerance::F16
    };

    fn noise_of(&self, op: &str) -> f64 {
        let listed = self.noise.iter().chain(NOISE).find(|(name, _)| *name == op);
        listed.map_or(OTHER, |(_, limit)| *limit)
    }
}

/// One line of the report.
struct Line {
    op: String,
    cases: usize,
    max_error: f64,
    limit: f64,
    failures: Vec<String>,
}

/// The state of a run over all cases of one backend.
pub struct Check {
    backend: String,
    tolerance: Tolerance,
    lines: Vec<Line>,
    /// The case at work.
    op: String,
    label: String,
    /// Hashes of all outputs of the first build, and how many this build has compared.
    prints: Vec<(String, u64)>,
    compared: usize,
    first_build: bool,
}

impl Check {
    pub fn new(backend: &str, tolerance: Tolerance) -> Self {
        Check {
            backend: backend.to_owned(),
            tolerance,
            lines: Vec::new(),
            op: "start".to_owned(),
            label: String::new(),
            prints: Vec::new(),
            compared: 0,
            first_build: true,
        }
    }

    /// From here on results have to repeat those of the first build.
    pub fn next_build(&mut self) {
        if !self.first_build && self.compared != self.prints.len() {
            self.fail("a build did not run every case");
        }
        self.first_build = false;
        self.compared = 0;
    }

    /// Runs one op and looks whether its inputs are still what they were.
    pub fn run<B: Backend>(
        &mut self,
        backend: &B,
        op: &str,
        label: String,
        inputs: &[&dyn Input<B>],
        call: impl FnOnce() -> Result<(), BackendError>,
    ) {
        self.op = op.to_owned();
        self.label = label;
        if self.first_build {
            self.line(self.tolerance.noise_of(op)).cases += 1;
        }
        if let Err(error) = call() {
            self.fail(&format!("returned an error: {error}"));
        }
        for (index, input) in inputs.iter().enumerate() {
            if !input.unchanged(backend) {
                self.fail(&format!("changed input {index}"));
            }
        }
    }

    /// Gives an output of the op that ran last a line and a limit of its own, `op/part`.
    pub fn part(&mut self, part: &str) {
        self.op = format!("{}/{part}", self.op);
        if self.first_build {
            self.line(self.tolerance.noise_of(&self.op.clone())).cases += 1;
        }
    }

    /// Compares an output of the op that ran last: its first elements with `exact`, the others with
    /// what they were.
    pub fn expect<B: Backend, T: Element>(
        &mut self,
        backend: &B,
        out: &Buf<B, T>,
        exact: impl FnOnce() -> Vec<Exact>,
    ) {
        let after = out.after(backend);
        if !self.repeats(&after) || !self.first_build {
            return;
        }
        let exact = exact();
        assert!(exact.len() <= after.len(), "more is expected than there is");
        let rest = std::iter::repeat(Exact::UNTOUCHED);
        let mut worst = 0.0f64;
        for (index, (got, exact)) in after.iter().zip(exact.into_iter().chain(rest)).enumerate() {
            if exact.is_untouched() {
                if !same_bits(got, &out.before()[index]) {
                    let got = got.to_f32();
                    self.fail(&format!("element {index} must stay untouched, is {got}"));
                    break;
                }
                continue;
            }
            let error = distance::<T>(f64::from(got.to_f32()), exact);
            if error > self.tolerance.noise_of(&self.op) && error > worst {
                let value = exact.value;
                self.fail(&format!(
                    "element {index} is {}, exact is {value}",
                    got.to_f32()
                ));
            }
            worst = worst.max(error);
        }
        let line = self.line(0.0);
        line.max_error = line.max_error.max(worst);
    }

    /// Compares host values bit for bit.
    pub fn expect_bits<T: Plain>(&mut self, got: &[T], expected: &[T]) {
        if self.repeats(got) && cast_slice::<T, u8>(got) != cast_slice::<T, u8>(expected) {
            self.fail("bits differ");
        }
    }

    /// Whether this output is the first build's, bit for bit; in the first build it becomes so.
    fn repeats<T: Plain>(&mut self, values: &[T]) -> bool {
        // FNV-1a.
        let hash = cast_slice::<T, u8>(values)
            .iter()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
        let print = (format!("{} {}", self.op, self.label), hash);
        if self.first_build {
            self.prints.push(print);
            return true;
        }
        let same = self.prints.get(self.compared) == Some(&print);
        self.compared += 1;
        if !same {
            self.fail("is not bit-equal with another number of threads");
        }
        same
    }

    /// Holds gradients against central differences of a functional: `functional` in f64, and `own`
    /// as the backend computes it.
    ///
    /// `at` and `gradients` are lists of tensors: the point, and what the backward op returned.
    #[allow(clippy::too_many_arguments)]
    pub fn gradient<B: Backend>(
        &mut self,
        backend: &B,
        op: &str,
        label: String,
        at: &[&[f64]],
        gradients: &[&[f64]],
        functional: impl Fn(&[Vec<f64>]) -> f64,
        own: impl Fn(&B, &[Vec<f64>]) -> f64,
    ) {
        if !self.first_build {
            return;
        }
        assert_eq!(at.len(), gradients.len());
        let mut numbers = Numbers::new(0x6ea0);
        let point: Vec<Vec<f64>> = at.iter().map(|x| x.to_vec()).collect();
        for (tensor, gradient) in gradients.iter().enumerate() {
            let len = point[tensor].len();
            assert_eq!(len, gradient.len());
            let largest = gradient.iter().fold(0.0f64, |max, g| max.max(g.abs()));
            let norm = dot(gradient, gradient).sqrt();
            assert!(largest > 0.0, "{op} {label}: no gradient to look at");

            self.difference_case(op, &label, "f64-difference", self.tolerance.difference);
            for index in coordinates(&mut numbers, len) {
                let mut direction = vec![0.0; len];
                direction[index] = 1.0;
                let exact = difference(&point, tensor, &direction, 1e-3, &functional);
                let error = (exact - gradient[index]).abs() / largest;
                self.note(error, &|| {
                    let g = gradient[index];
                    format!("tensor {tensor}, element {index} is {g}, difference {exact}")
                });
            }
            let directions = [(); 2].map(|()| numbers.signs(len));
            for direction in &directions {
                let exact = difference(&point, tensor, direction, 1e-3, &functional);
                let error = (exact - dot(gradient, direction)).abs() / norm;
                self.note(error, &|| {
                    format!("tensor {tensor} along a direction: difference {exact}")
                });
            }
            let Some(limit) = self.tolerance.own_difference else {
                continue;
            };
            self.difference_case(op, &label, "own-difference", limit);
            for direction in &directions {
                let f = |x: &[Vec<f64>]| own(backend, x);
                let own = difference(&point, tensor, direction, 1.0 / 32.0, &f);
                let error = (own - dot(gradient, direction)).abs() / norm;
                self.note(error, &|| {
                    format!("tensor {tensor} along a direction: own difference {own}")
                });
            }
        }
    }

    fn difference_case(&mut self, op: &str, label: &str, kind: &str, limit: f64) {
        self.op = format!("{op}/{kind}");
        self.label = label.to_owned();
        self.line(limit).cases += 1;
    }

    /// Notes a distance that is measured already.
    fn note(&mut self, error: f64, message: &dyn Fn() -> String) {
        let error = if error.is_nan() { f64::INFINITY } else { error };
        let line = self.line(0.0);
        let worse = error > line.limit && error > line.max_error;
        line.max_error = line.max_error.max(error);
        if worse {
            self.fail(&message());
        }
    }

    /// Notes a failure of the case at work.
    pub fn fail(&mut self, message: &str) {
        let message = format!("{}: {message}", self.label);
        self.line(0.0).failures.push(message);
    }

    /// The line of the op at work; `limit` counts where it is new.
    fn line(&mut self, limit: f64) -> &mut Line {
        let index = match self.lines.iter().position(|line| line.op == self.op) {
            Some(index) => index,
            None => {
                self.lines.push(Line {
                    op: self.op.clone(),
                    cases: 0,
                    max_error: 0.0,
                    limit,
                    failures: Vec::new(),
                });
                self.lines.len() - 1
            }
        };
        &mut self.lines[index]
    }

    /// Prints the report and fails the test where a case failed or an op has none.
    pub fn finish(self, ops: &[String]) {
        let mut bad = Vec::new();
        println!(
            "{:<44} {:<10} {:>5} {:>10} {:>8}",
            "op", "backend", "cases", "max_error", "limit"
        );
        for line in &self.lines {
            let ok = line.failures.is_empty() && line.max_error <= line.limit;
            println!(
                "{:<44} {:<10} {:>5} {:>10.3e} {:>8.1e} {}",
                line.op,
                self.backend,
                line.cases,
                line.max_error,
                line.limit,
                if ok { "ok" } else { "FAIL" }
            );
            for failure in line.failures.iter().take(4) {
                println!("    {failure}");
            }
            if !ok {
                bad.push(line.op.clone());
            }
        }
        let has = |op: &str| self.lines.iter().any(|line| line.op == op);
        for op in ops {
            if !has(op) {
                bad.push(format!("{op} (no case)"));
            }
            let gradient = op.ends_with("_backward") || op.ends_with("_gradient");
            if gradient && !has(&format!("{op}/f64-difference")) {
                bad.push(format!("{op} (no gradient case)"));
            }
        }
        // Ops that are their own gradient, or whose gradient the next op takes over.
        for op in [
            "rotary",
            "cross_entropy",
            "residual",
            "residual_sum",
            "put_columns",
            "take_columns",
        ] {
            if !ops.is_empty() && !has(&format!("{op}/f64-difference")) {
                bad.push(format!("{op} (no gradient case)"));
            }
        }
        assert!(bad.is_empty(), "{}: {}", self.backend, bad.join(", "));
    }
}

/// Up to 40 places of a tensor.
fn coordinates(numbers: &mut Numbers, len: usize) -> Vec<usize> {
    let picked = numbers.distinct(len, len.min(40));
    picked.into_iter().map(|index| index as usize).collect()
}

/// The derivative of `f` along a direction in one tensor: central differences of fourth order.
fn difference(
    point: &[Vec<f64>],
    tensor: usize,
    direction: &[f64],
    step: f64,
    f: &impl Fn(&[Vec<f64>]) -> f64,
) -> f64 {
    let moved = |by: f64| {
        let mut x = point.to_vec();
        for (x, d) in x[tensor].iter_mut().zip(direction) {
            *x += by * d;
        }
        f(&x)
    };
    let (near, far) = (
        moved(step) - moved(-step),
        moved(2.0 * step) - moved(-2.0 * step),
    );
    (8.0 * near - far) / (12.0 * step)
}

/// How far a result is off, beyond its rounding, in f32 epsilons of the magnitude.
fn distance<T: Element>(got: f64, exact: Exact) -> f64 {
    if got == exact.value {
        return 0.0;
    }
    let error = (got - exact.value).abs();
    let rounding = exact.steps * step::<T>(got.abs().max(exact.value.abs()));
    let beyond = error - rounding - exact.on_the_way - FLUSHED;
    if beyond <= 0.0 {
        0.0
    } else if beyond.is_finite() {
        beyond / (EPSILON_F32 * exact.magnitude)
    } else {
        f64::INFINITY
    }
}

/// Distance of neighbouring values of the storage type at `x`.
fn step<T: Element>(x: f64) -> f64 {
    let (fraction_bits, min_exponent) = match T::NAME {
        "f32" => (23, -126),
        "f16" => (10, -14),
        "bf16" => (7, -126),
        other => unreachable!("the steps of {other} are not known here"),
    };
    let exponent = (x.to_bits() >> 52) as i32 - 1023;
    2f64.powi(exponent.max(min_exponent) - fraction_bits)
}
