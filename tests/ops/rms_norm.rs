//! RMS norm, the residual sum in front of it, and their gradients.

use mp_train::backend::{Backend, NormShape};

use crate::buffer::{Act, Buf, Input};
use crate::check::Check;
use crate::norm::{EPS, SHAPES};
use crate::numbers::{Exact, Numbers, dot, values};

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(11);
    for (rows, cols) in SHAPES {
        norm(b, check, &mut numbers, rows, cols);
    }
    for len in [1, 3, 65, 97, 40_001] {
        residual_sum(b, check, &mut numbers, len);
    }
}

fn residual_sum<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize) {
    // Beyond the storage type's steps, and beyond its range.
    for width in [1.0, 300_000.0] {
        let x = Buf::<B, f32>::of(b, &numbers.around(0.0, width, len));
        let branch = Act::<B>::of(b, &numbers.values(len));
        let mut out = Buf::<B, f32>::blank(b, len);
        let label = format!("len {len}, |x| < {width}");
        check.run(b, "residual_sum", label, &[&x, &branch], || {
            b.residual_sum(&mut out.device, &x.device, &branch.device, len)
        });
        let (x, branch) = (x.values(), branch.values());
        check.expect(b, &out, || {
            let pairs = x.iter().zip(&branch);
            pairs.map(|(&x, &branch)| Exact::sum([x, branch])).collect()
        });
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
    dout: Vec<f64>,
    x: Vec<f64>,
    rstds: Vec<f64>,
    weight: Vec<f64>,
    cols: usize,
}

impl Saved {
    fn dx(&self, residual: Option<&[f64]>) -> Vec<Exact> {
        let mut dx = Vec::new();
        for (row, rstd) in self.rstds.iter().enumerate() {
            let places = row * self.cols..(row + 1) * self.cols;
            let normed: Vec<f64> = self.x[places.clone()].iter().map(|x| x * rstd).collect();
            let dout = self.dout[places.clone()].iter();
            let g: Vec<f64> = dout.zip(&self.weight).map(|(g, w)| g * w).collect();
            let width = self.cols as f64;
            let terms = || g.iter().zip(&normed);
            let mean = dot(&g, &normed) / width;
            let size = terms().map(|(g, n)| (g * n).abs()).sum::<f64>() / width;
            for ((g, normed), place) in terms().zip(places) {
                let along = residual.map_or(0.0, |residual| residual[place]);
                let value = along + rstd * (g - normed * mean);
                let magnitude = along.abs() + rstd * (g.abs() + normed.abs() * size);
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
                let place = row * self.cols + col;
                let term = self.dout[place] * self.x[place] * rstd;
                (value + term, size + term.abs())
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
    // The row to be normed is a residual sum.
    let along = Buf::<B, f32>::of(b, &numbers.around(0.5, 1.0, rows * cols));
    let branch = Act::<B>::of(b, &numbers.values(rows * cols));
    let terms = [along.values(), branch.values()];
    let x = Buf::<B, f32>::of(b, &sum(&terms));
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
    let residual = Act::<B>::of(b, &numbers.values(rows * cols));
    let inputs: [&dyn Input<B>; 5] = [&dout, &x, &stats, &weight, &residual];
    let saved = Saved {
        dout: dout.values(),
        x: x.values(),
        rstds: stats.values(),
        weight: weight.values(),
        cols,
    };
    let mut dweight = Buf::<B, f32>::target(b, &numbers.values(cols));
    let before = dweight.values();
    let op = "rms_norm_weight_gradient";
    check.run(b, op, label.clone(), &inputs[..3], || {
        let dweight = &mut dweight.device;
        b.rms_norm_weight_gradient(dweight, &dout.device, &x.device, &stats.device, shape)
    });
    check.expect(b, &dweight, || saved.dweight(&before));

    let dx = [None, Some(&residual)].map(|residual| {
        let mut dx = Act::<B>::blank(b, rows * cols);
        let label = format!("{label}, residual {}", residual.is_some());
        check.run(b, "rms_norm_backward", label, &inputs, || {
            b.rms_norm_backward(
                &mut dx.device,
                &dout.device,
                residual.map(|residual| &residual.device),
                &x.device,
                &stats.device,
                &weight.device,
                shape,
            )
        });
        check.expect(b, &dx, || {
            saved.dx(residual.map(|residual| residual.values()).as_deref())
        });
        dx.result(b)
    });

    // A row of one or three values is nearly independent of x: no gradient to look at.
    if cols < 65 || rows * cols > 97 * 97 {
        return;
    }
    let after = dweight.result(b);
    let dweight: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
    let c = dout.values();
    let functional = |x: &[f64], weight: &[f64]| dot(&c, &values(&forward(x, weight, cols).0));
    let own = |b: &B, x: &Buf<B, f32>, weight: &[f64]| {
        let weight = Act::<B>::of(b, weight);
        let mut out = Act::<B>::blank(b, rows * cols);
        let mut stats = Buf::<B, f32>::blank(b, rows);
        let stats = &mut stats.device;
        b.rms_norm(&mut out.device, stats, &x.device, &weight.device, shape)
            .unwrap();
        dot(&c, &out.result(b))
    };
    let (x, weight, residual) = (x.values(), weight.values(), residual.values());
    check.gradient(
        b,
        op,
        label.clone(),
        &[&weight],
        &[&dweight],
        |p| functional(&x, &p[0]),
        |b, p| own(b, &Buf::of(b, &x), &p[0]),
    );
    // With a residual, x is used beside the norm, in a sum whose gradient that is.
    let none = vec![0.0; rows * cols];
    for (dx, beside) in dx.iter().zip([&none, &residual]) {
        check.gradient(
            b,
            "rms_norm_backward",
            label.clone(),
            &[&x],
            &[dx],
            |p| functional(&p[0], &weight) + dot(beside, &p[0]),
            |b, p| {
                let x = Buf::of(b, &p[0]);
                own(b, &x, &weight) + dot(beside, &x.values())
            },
        );
    }
    // Both terms of the sum in front of the norm have its gradient.
    let [_, dx] = dx;
    check.gradient(
        b,
        "residual_sum",
        label,
        &[&terms[0], &terms[1]],
        &[&dx, &dx],
        |p| functional(&sum(p), &weight) + dot(&residual, &sum(p)),
        |b, p| {
            let (along, branch) = (Buf::<B, f32>::of(b, &p[0]), Act::<B>::of(b, &p[1]));
            let mut x = Buf::<B, f32>::blank(b, rows * cols);
            b.residual_sum(&mut x.device, &along.device, &branch.device, rows * cols)
                .unwrap();
            own(b, &x, &weight) + dot(&residual, &x.result(b))
        },
    );
}

fn sum(terms: &[Vec<f64>]) -> Vec<f64> {
    terms[0].iter().zip(&terms[1]).map(|(a, b)| a + b).collect()
}
