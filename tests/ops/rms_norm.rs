//! RMS norm and its gradients.

use mp_train::backend::{Backend, NormShape, RowGradient};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::norm::{ALPHA, EPS, SHAPES};
use crate::numbers::{Exact, Numbers, dot, values};

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(11);
    for (rows, cols) in SHAPES {
        norm(b, check, &mut numbers, rows, cols);
    }
}

/// The exact forward pass: out, and rstds.
fn forward(x: &[f64], weight: &[f64], cols: usize) -> (Vec<Exact>, Vec<Exact>) {
    let (mut out, mut rstds) = (Vec::new(), Vec::new());
    for x in x.chunks_exact(cols) {
        let mean_square = dot(x, x) / cols as f64;
        let rstd = 1.0 / (mean_square + f64::from(EPS)).sqrt();
        // The value, and what the noise of the sum makes of it.
        let sized = |value: f64| Exact::new(value, 2.0 * value.abs());
        out.extend(x.iter().zip(weight).map(|(x, w)| sized(x * rstd * w)));
        rstds.push(sized(rstd));
    }
    (out, rstds)
}

/// What the backward ops are given, as values.
struct Saved {
    /// `dout + alpha * residual`, with the sum of absolute terms.
    gradient: Vec<Exact>,
    x: Vec<f64>,
    rstds: Vec<f64>,
    weight: Vec<f64>,
    cols: usize,
}

impl Saved {
    fn dx(&self, before: Option<&[f64]>) -> Vec<Exact> {
        let mut dx = Vec::new();
        for (row, rstd) in self.rstds.iter().enumerate() {
            let places = row * self.cols..(row + 1) * self.cols;
            let normed: Vec<f64> = self.x[places.clone()].iter().map(|x| x * rstd).collect();
            let g: Vec<Exact> = self.gradient[places.clone()]
                .iter()
                .zip(&self.weight)
                .map(|(g, w)| Exact::new(g.value * w, g.magnitude * w.abs()))
                .collect();
            let width = self.cols as f64;
            let terms = || g.iter().zip(&normed);
            let mean = terms().map(|(g, n)| g.value * n).sum::<f64>() / width;
            let size = terms().map(|(g, n)| g.magnitude * n.abs()).sum::<f64>() / width;
            for ((g, normed), place) in g.iter().zip(&normed).zip(places) {
                let along = before.map_or(0.0, |before| before[place]);
                let value = along + rstd * (g.value - normed * mean);
                let magnitude = along.abs() + rstd * (g.magnitude + normed.abs() * size);
                dx.push(Exact::new(value, magnitude));
            }
        }
        dx
    }

    fn dweight(&self, before: &[f64]) -> Vec<Exact> {
        let column = |col: usize| {
            let start = (before[col], before[col].abs());
            let rows = self.rstds.iter().enumerate();
            let (value, magnitude) = rows.fold(start, |(value, size), (row, rstd)| {
                let (g, x) = (
                    self.gradient[row * self.cols + col],
                    self.x[row * self.cols + col],
                );
                (
                    value + g.value * x * rstd,
                    size + g.magnitude * x.abs() * rstd,
                )
            });
            Exact::new(value, magnitude)
        };
        (0..self.cols).map(column).collect()
    }
}

fn norm<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, rows: usize, cols: usize) {
    let shape = NormShape {
        rows,
        cols,
        eps: EPS,
    };
    let x = Buf::<B, f32>::of(b, &numbers.around(0.5, 2.0, rows * cols));
    let weight = Act::<B>::of(b, &numbers.around(1.0, 0.5, cols));
    let (exact, rstds) = forward(&x.values(), &weight.values(), cols);
    let mut out = Act::<B>::blank(b, rows * cols);
    let mut stats = Buf::<B, f32>::blank(b, rows);
    let label = format!("rows {rows}, cols {cols}");
    check.run(b, "rms_norm", label.clone(), &[&x, &weight], || {
        let stats = &mut stats.device;
        b.rms_norm(&mut out.device, stats, &x.device, &weight.device, shape)
    });
    check.expect(b, &out, || exact);
    check.expect(b, &stats, || rstds.clone());

    let stats = Buf::<B, f32>::of(b, &values(&rstds));
    let dout = Act::<B>::of(b, &numbers.values(rows * cols));
    let along = Act::<B>::of(b, &numbers.values(rows * cols));
    for (residual, accumulate) in [(None, false), (None, true), (Some(ALPHA), false)] {
        let label = format!(
            "{label}, residual {}, accumulate {accumulate}",
            residual.is_some()
        );
        let gradient = RowGradient::<B> {
            dout: &dout.device,
            residual: residual.map(|alpha| (&along.device, alpha)),
        };
        let alpha = f64::from(residual.unwrap_or(0.0));
        let pairs = dout.values().into_iter().zip(along.values());
        let saved = Saved {
            gradient: pairs
                .map(|(dout, along)| Exact::sum([dout, alpha * along]))
                .collect(),
            x: x.values(),
            rstds: stats.values(),
            weight: weight.values(),
            cols,
        };

        let mut dx = if accumulate {
            Act::<B>::target(b, &numbers.values(rows * cols))
        } else {
            Act::<B>::blank(b, rows * cols)
        };
        let dx_before = accumulate.then(|| dx.values());
        let op = "rms_norm_backward";
        let inputs: [&dyn crate::buffer::Input<B>; 5] = [&dout, &along, &x, &stats, &weight];
        check.run(b, op, label.clone(), &inputs, || {
            b.rms_norm_backward(
                &mut dx.device,
                gradient,
                &x.device,
                &stats.device,
                &weight.device,
                shape,
                accumulate,
            )
        });
        check.expect(b, &dx, || saved.dx(dx_before.as_deref()));

        let mut dweight = Buf::<B, f32>::target(b, &numbers.values(cols));
        let before = dweight.values();
        let op = "rms_norm_weight_gradient";
        check.run(b, op, label.clone(), &inputs[..4], || {
            let dweight = &mut dweight.device;
            b.rms_norm_weight_gradient(dweight, gradient, &x.device, &stats.device, shape)
        });
        check.expect(b, &dweight, || saved.dweight(&before));

        // A row of one or three values is nearly independent of x: no gradient to look at.
        if cols < 65 || rows * cols > 97 * 97 {
            continue;
        }
        let after = dweight.result(b);
        let dweight: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        // With `accumulate`, x is used once more, in a residual whose gradient dx held.
        let c = values(&saved.gradient);
        let aside = dx_before.unwrap_or_else(|| vec![0.0; rows * cols]);
        let functional = |x: &[f64], weight: &[f64]| {
            dot(&c, &values(&forward(x, weight, cols).0)) + dot(&aside, x)
        };
        let own = |b: &B, x: &[f64], weight: &[f64]| {
            let x = Buf::<B, f32>::of(b, x);
            let weight = Act::<B>::of(b, weight);
            let mut out = Act::<B>::blank(b, rows * cols);
            let mut stats = Buf::<B, f32>::blank(b, rows);
            let stats = &mut stats.device;
            b.rms_norm(&mut out.device, stats, &x.device, &weight.device, shape)
                .unwrap();
            dot(&c, &out.result(b)) + dot(&aside, &x.values())
        };
        let (x, weight) = (x.values(), weight.values());
        check.gradient(
            b,
            "rms_norm_backward",
            label.clone(),
            &[&x],
            &[&dx.result(b)],
            |p| functional(&p[0], &weight),
            |b, p| own(b, &p[0], &weight),
        );
        check.gradient(
            b,
            "rms_norm_weight_gradient",
            label,
            &[&weight],
            &[&dweight],
            |p| functional(&x, &p[0]),
            |b, p| own(b, &x, &p[0]),
        );
    }
}
