//! Layer norm, the residual sum in front of it, and their gradients.

use mp_train::backend::{Backend, NormShape, RowGradient};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers, dot, values};

pub const EPS: f32 = 1e-5;

/// The residual factor of ChatGLM-6B, the square root of 56.
pub const ALPHA: f32 = 7.483_315;

/// Rows and columns.
pub const SHAPES: [(usize, usize); 23] = [
    (1, 1),
    (3, 1),
    (65, 1),
    (97, 1),
    (1, 3),
    (3, 3),
    (65, 3),
    (97, 3),
    (1, 65),
    (3, 65),
    (65, 65),
    (97, 65),
    (1, 97),
    (3, 97),
    (65, 97),
    (97, 97),
    // Rows of whole 16-byte pieces.
    (3, 64),
    (97, 68),
    (3, 1_032),
    // More than one piece of work for the threads, by rows and by columns.
    (97, 521),
    (2, 20_011),
    (2, 20_016),
    // Many rows to be summed.
    (4_200, 8),
];

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(3);
    for (rows, cols) in SHAPES {
        norm(b, check, &mut numbers, rows, cols);
    }
    for len in [1, 3, 65, 97, 40_001] {
        residual(b, check, &mut numbers, len);
    }
}

/// The exact forward pass: out, then means, then rstds.
struct Forward {
    out: Vec<Exact>,
    means: Vec<Exact>,
    rstds: Vec<Exact>,
}

fn forward(x: &[f64], weight: &[f64], bias: &[f64], cols: usize) -> Forward {
    let width = cols as f64;
    let mut result = Forward {
        out: Vec::new(),
        means: Vec::new(),
        rstds: Vec::new(),
    };
    for x in x.chunks_exact(cols) {
        let mean = x.iter().sum::<f64>() / width;
        let size = x.iter().map(|x| x.abs()).sum::<f64>() / width;
        let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / width;
        let spread = x
            .iter()
            .map(|x| (x - mean).abs() * (x.abs() + size))
            .sum::<f64>()
            / width;
        let rstd = 1.0 / (variance + f64::from(EPS)).sqrt();
        // A variance that is small beside the values is known less well.
        let doubt = 1.0 + rstd * rstd * spread;
        for ((x, weight), bias) in x.iter().zip(weight).zip(bias) {
            let value = (x - mean) * rstd * weight;
            let magnitude = (x.abs() + size) * rstd * weight.abs() + value.abs() * doubt;
            result
                .out
                .push(Exact::new(value + bias, magnitude + bias.abs()));
        }
        result.means.push(Exact::new(mean, size));
        result.rstds.push(Exact::new(rstd, rstd * doubt));
    }
    result
}

/// What the backward ops are given, as values.
struct Saved {
    /// `dout + alpha * residual`, with the sum of absolute terms.
    gradient: Vec<Exact>,
    x: Vec<f64>,
    /// Means, then rstds.
    stats: Vec<f64>,
    weight: Vec<f64>,
    cols: usize,
}

impl Saved {
    fn rows(&self) -> usize {
        self.x.len() / self.cols
    }

    /// The normed value at one place.
    fn normed(&self, row: usize, col: usize) -> Exact {
        let (mean, rstd) = (self.stats[row], self.stats[self.rows() + row]);
        let x = self.x[row * self.cols + col];
        Exact::new((x - mean) * rstd, (x.abs() + mean.abs()) * rstd)
    }

    fn dx(&self) -> Vec<Exact> {
        let mut dx = Vec::new();
        for row in 0..self.rows() {
            let rstd = self.stats[self.rows() + row];
            let normed: Vec<Exact> = (0..self.cols).map(|col| self.normed(row, col)).collect();
            let g: Vec<Exact> = self.gradient[row * self.cols..][..self.cols]
                .iter()
                .zip(&self.weight)
                .map(|(g, w)| Exact::new(g.value * w, g.magnitude * w.abs()))
                .collect();
            let mean = |term: &dyn Fn(usize) -> f64| {
                (0..self.cols).map(term).sum::<f64>() / self.cols as f64
            };
            let g_mean = mean(&|col| g[col].value);
            let gx_mean = mean(&|col| g[col].value * normed[col].value);
            let g_size = mean(&|col| g[col].magnitude);
            let gx_size = mean(&|col| g[col].magnitude * normed[col].magnitude);
            for (g, normed) in g.iter().zip(&normed) {
                let value = g.value - g_mean - normed.value * gx_mean;
                let magnitude = g.magnitude + g_size + normed.magnitude * gx_size;
                dx.push(Exact::new(rstd * value, rstd * magnitude));
            }
        }
        dx
    }

    /// Gradient of the weight, added to `before`.
    fn dweight(&self, before: &[f64]) -> Vec<Exact> {
        self.column_sums(before, |row, col| {
            let (g, normed) = (self.gradient[row * self.cols + col], self.normed(row, col));
            (g.value * normed.value, g.magnitude * normed.magnitude)
        })
    }

    /// Gradient of the bias, added to `before`.
    fn dbias(&self, before: &[f64]) -> Vec<Exact> {
        self.column_sums(before, |row, col| {
            let g = self.gradient[row * self.cols + col];
            (g.value, g.magnitude)
        })
    }

    fn column_sums(&self, before: &[f64], term: impl Fn(usize, usize) -> (f64, f64)) -> Vec<Exact> {
        (0..self.cols)
            .map(|col| {
                let (mut value, mut magnitude) = (before[col], before[col].abs());
                for row in 0..self.rows() {
                    let (term, size) = term(row, col);
                    value += term;
                    magnitude += size;
                }
                Exact::new(value, magnitude)
            })
            .collect()
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
    let bias = Act::<B>::of(b, &numbers.values(cols));
    let exact = forward(&x.values(), &weight.values(), &bias.values(), cols);

    let mut out = Act::<B>::blank(b, rows * cols);
    let mut stats = Buf::<B, f32>::blank(b, 2 * rows);
    let label = format!("rows {rows}, cols {cols}");
    check.run(
        b,
        "layer_norm",
        label.clone(),
        &[&x, &weight, &bias],
        || {
            b.layer_norm(
                &mut out.device,
                &mut stats.device,
                &x.device,
                &weight.device,
                &bias.device,
                shape,
            )
        },
    );
    check.expect(b, &out, || exact.out.clone());
    check.expect(b, &stats, || [&exact.means[..], &exact.rstds].concat());

    // Statistics as exact as f32 can hold them.
    let stats = [values(&exact.means), values(&exact.rstds)].concat();
    let stats = Buf::<B, f32>::of(b, &stats);
    let dout = Act::<B>::of(b, &numbers.values(rows * cols));
    let along = Act::<B>::of(b, &numbers.values(rows * cols));
    for residual in [None, Some((&along.device, ALPHA))] {
        let label = format!("{label}, residual {}", residual.is_some());
        let gradient = RowGradient::<B> {
            dout: &dout.device,
            residual,
        };
        let (branch, along_values) = (dout.values(), along.values());
        let saved = Saved {
            gradient: (0..rows * cols)
                .map(|at| match residual {
                    None => Exact::sum([branch[at]]),
                    Some(_) => Exact::sum([branch[at], f64::from(ALPHA) * along_values[at]]),
                })
                .collect(),
            x: x.values(),
            stats: stats.values(),
            weight: weight.values(),
            cols,
        };

        let mut dx = Act::<B>::blank(b, rows * cols);
        let op = "layer_norm_backward";
        check.run(
            b,
            op,
            label.clone(),
            &[&dout, &along, &x, &stats, &weight],
            || {
                b.layer_norm_backward(
                    &mut dx.device,
                    gradient,
                    &x.device,
                    &stats.device,
                    &weight.device,
                    shape,
                )
            },
        );
        check.expect(b, &dx, || saved.dx());

        let mut dweight = Buf::<B, f32>::target(b, &numbers.values(cols));
        let mut dbias = Buf::<B, f32>::target(b, &numbers.values(cols));
        let (dweight_before, dbias_before) = (dweight.values(), dbias.values());
        let op = "layer_norm_weight_gradient";
        check.run(b, op, label.clone(), &[&dout, &along, &x, &stats], || {
            b.layer_norm_weight_gradient(
                &mut dweight.device,
                &mut dbias.device,
                gradient,
                &x.device,
                &stats.device,
                shape,
            )
        });
        check.expect(b, &dweight, || saved.dweight(&dweight_before));
        check.expect(b, &dbias, || saved.dbias(&dbias_before));

        // A row of one or three values is nearly independent of x: no gradient to look at.
        if cols < 65 || rows * cols > 97 * 97 {
            continue;
        }
        let added = |after: Vec<f64>, before: &[f64]| -> Vec<f64> {
            after.iter().zip(before).map(|(a, b)| a - b).collect()
        };
        let gradients = [
            dx.result(b),
            added(dweight.result(b), &dweight_before),
            added(dbias.result(b), &dbias_before),
        ];
        // The norm's output a is used as branch (factor dout) and along the residual.
        let c = values(&saved.gradient);
        let functional = |p: &[Vec<f64>]| dot(&c, &values(&forward(&p[0], &p[1], &p[2], cols).out));
        let own = |b: &B, p: &[Vec<f64>]| {
            let x = Buf::<B, f32>::of(b, &p[0]);
            let (weight, bias) = (Act::<B>::of(b, &p[1]), Act::<B>::of(b, &p[2]));
            let mut out = Act::<B>::blank(b, rows * cols);
            let mut stats = Buf::<B, f32>::blank(b, 2 * rows);
            b.layer_norm(
                &mut out.device,
                &mut stats.device,
                &x.device,
                &weight.device,
                &bias.device,
                shape,
            )
            .unwrap();
            dot(&c, &out.result(b))
        };
        let (x, weight, bias) = (x.values(), weight.values(), bias.values());
        check.gradient(
            b,
            "layer_norm_backward",
            label.clone(),
            &[&x],
            &[&gradients[0]],
            |p| functional(&[p[0].clone(), weight.clone(), bias.clone()]),
            |b, p| own(b, &[p[0].clone(), weight.clone(), bias.clone()]),
        );
        check.gradient(
            b,
            "layer_norm_weight_gradient",
            label.clone(),
            &[&weight, &bias],
            &[&gradients[1], &gradients[2]],
            |p| functional(&[x.clone(), p[0].clone(), p[1].clone()]),
            |b, p| own(b, &[x.clone(), p[0].clone(), p[1].clone()]),
        );
        if residual.is_none() {
            continue;
        }

        // The same gradient, seen as that of the residual sum `alpha * a + branch(a)` over the norm:
        // with the output's gradient y and branch(a) = slope * a, a receives y * slope + alpha * y.
        let y = along_values;
        let slope: Vec<f64> = branch.iter().zip(&y).map(|(dout, y)| dout / y).collect();
        let sum = |a: &[f64]| -> f64 {
            let terms = a.iter().zip(&slope).zip(&y);
            terms
                .map(|((a, slope), y)| y * (f64::from(ALPHA) * a + slope * a))
                .sum()
        };
        check.gradient(
            b,
            "residual",
            label,
            &[&x],
            &[&gradients[0]],
            |p| sum(&values(&forward(&p[0], &weight, &bias, cols).out)),
            |b, p| {
                let a = values(&forward(&p[0], &weight, &bias, cols).out);
                let branch: Vec<f64> = a.iter().zip(&slope).map(|(a, slope)| a * slope).collect();
                let (a, branch) = (Act::<B>::of(b, &a), Act::<B>::of(b, &branch));
                let mut out = Buf::<B, f32>::blank(b, rows * cols);
                b.residual(
                    &mut out.device,
                    &a.device,
                    ALPHA,
                    &branch.device,
                    rows * cols,
                )
                .unwrap();
                dot(&y, &out.result(b))
            },
        );
    }
}

fn residual<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, len: usize) {
    let x = Act::<B>::of(b, &numbers.values(len));
    let branch = Act::<B>::of(b, &numbers.values(len));
    let mut out = Buf::<B, f32>::blank(b, len);
    check.run(b, "residual", format!("len {len}"), &[&x, &branch], || {
        b.residual(&mut out.device, &x.device, ALPHA, &branch.device, len)
    });
    let (x, branch) = (x.values(), branch.values());
    check.expect(b, &out, || {
        let pairs = x.iter().zip(&branch);
        pairs
            .map(|(x, &branch)| Exact::sum([f64::from(ALPHA) * x, branch]))
            .collect()
    });
}
