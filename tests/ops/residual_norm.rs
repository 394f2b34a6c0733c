//! Residual sums that are normed in the same pass: the bits of one op after the other, which have cases of
//! their own.

use mp_train::backend::{Backend, NormShape};

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::norm::{ALPHA, EPS, SHAPES};
use crate::numbers::Numbers;

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(15);
    for (rows, cols) in SHAPES {
        let shape = NormShape {
            rows,
            cols,
            eps: EPS,
        };
        layer_norm(b, check, &mut numbers, shape);
        rms_norm(b, check, &mut numbers, shape);
    }
}

/// Places of an op's outputs: out, statistics and sum.
struct Outputs<B: Backend> {
    out: Act<B>,
    stats: Buf<B, f32>,
    sum: Buf<B, f32>,
}

impl<B: Backend> Outputs<B> {
    fn new(b: &B, shape: NormShape) -> Self {
        let len = shape.rows * shape.cols;
        Outputs {
            out: Act::<B>::blank(b, len),
            stats: Buf::blank(b, 2 * shape.rows),
            sum: Buf::blank(b, len),
        }
    }

    fn expect(&self, b: &B, check: &mut Check, expected: &Self) {
        check.expect_bits(&self.out.after(b), &expected.out.after(b));
        check.expect_bits(&self.stats.after(b), &expected.stats.after(b));
        check.expect_bits(&self.sum.after(b), &expected.sum.after(b));
    }
}

fn layer_norm<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, shape: NormShape) {
    let len = shape.rows * shape.cols;
    let x = Act::<B>::of(b, &numbers.around(0.5, 1.0, len));
    let branch = Act::<B>::of(b, &numbers.values(len));
    let weight = Act::<B>::of(b, &numbers.around(1.0, 0.5, shape.cols));
    let bias = Act::<B>::of(b, &numbers.values(shape.cols));
    let mut one = Outputs::new(b, shape);
    let label = format!("rows {}, cols {}", shape.rows, shape.cols);
    let inputs: [&dyn crate::buffer::Input<B>; 4] = [&x, &branch, &weight, &bias];
    check.run(b, "residual_layer_norm", label, &inputs, || {
        let Outputs { out, stats, sum } = &mut one;
        b.residual_layer_norm(
            &mut out.device,
            &mut stats.device,
            &mut sum.device,
            &x.device,
            ALPHA,
            &branch.device,
            &weight.device,
            &bias.device,
            shape,
        )
    });
    let mut two = Outputs::new(b, shape);
    let Outputs { out, stats, sum } = &mut two;
    b.residual(&mut sum.device, &x.device, ALPHA, &branch.device, len)
        .unwrap();
    let (sum, weight, bias) = (&sum.device, &weight.device, &bias.device);
    b.layer_norm(&mut out.device, &mut stats.device, sum, weight, bias, shape)
        .unwrap();
    one.expect(b, check, &two);
}

fn rms_norm<B: Backend>(b: &B, check: &mut Check, numbers: &mut Numbers, shape: NormShape) {
    let len = shape.rows * shape.cols;
    let x = Buf::<B, f32>::of(b, &numbers.around(0.5, 1.0, len));
    let branch = Act::<B>::of(b, &numbers.values(len));
    let weight = Act::<B>::of(b, &numbers.around(1.0, 0.5, shape.cols));
    let mut one = Outputs::new(b, shape);
    let label = format!("rows {}, cols {}", shape.rows, shape.cols);
    check.run(
        b,
        "residual_rms_norm",
        label,
        &[&x, &branch, &weight],
        || {
            let Outputs { out, stats, sum } = &mut one;
            b.residual_rms_norm(
                &mut out.device,
                &mut stats.device,
                &mut sum.device,
                &x.device,
                &branch.device,
                &weight.device,
                shape,
            )
        },
    );
    let mut two = Outputs::new(b, shape);
    let Outputs { out, stats, sum } = &mut two;
    b.residual_sum(&mut sum.device, &x.device, &branch.device, len)
        .unwrap();
    let (sum, weight) = (&sum.device, &weight.device);
    b.rms_norm(&mut out.device, &mut stats.device, sum, weight, shape)
        .unwrap();
    one.expect(b, check, &two);
}
