//! Softmax cross-entropy.

use mp_train::backend::Backend;

use crate::buffer::{Act, Buf};
use crate::check::Check;
use crate::numbers::{Exact, Numbers};

pub fn cases<B: Backend>(b: &B, check: &mut Check) {
    let mut numbers = Numbers::new(9);
    for rows in [1, 3, 65, 97] {
        for vocab in [1, 3, 65, 97] {
            for width in [1.0, 30.0, 1000.0] {
                cross_entropy(b, check, &mut numbers, rows, vocab, width);
            }
        }
    }
    // Rows that can be loaded 16 bytes at a time.
    for (rows, vocab, width) in [
        (3, 8, 30.0),
        (65, 64, 1.0),
        (3, 4104, 1.0),
        (2, 20_008, 30.0),
    ] {
        cross_entropy(b, check, &mut numbers, rows, vocab, width);
    }
    cross_entropy(b, check, &mut numbers, 65, 1031, 5.0);
    cross_entropy(b, check, &mut numbers, 3, 20_011, 5.0);
}

/// Loss and gradient of one row.
fn row_exact(logits: &[f64], id: usize, scale: f64) -> (Exact, Vec<Exact>) {
    let max = logits.iter().fold(f64::NEG_INFINITY, |max, &x| max.max(x));
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let size = sum.ln() + max.abs() + logits[id].abs() + 1.0;
    let loss = Exact::new(sum.ln() + max - logits[id], size);
    let gradient = logits.iter().enumerate().map(|(index, x)| {
        let p = (x - max).exp() / sum;
        let hit = if index == id { 1.0 } else { 0.0 };
        let size = p * (1.0 + (x - max).abs()) + hit;
        Exact::new(scale * (p - hit), scale.abs() * size)
    });
    (loss, gradient.collect())
}

fn cross_entropy<B: Backend>(
    b: &B,
    check: &mut Check,
    numbers: &mut Numbers,
    rows: usize,
    vocab: usize,
    width: f64,
) {
    let first = 4;
    let scale = 3.7f32;
    let label = format!("rows {rows}, vocabulary {vocab}, |logit| < {width}");
    let ids = numbers.ids(vocab, first + rows + 2);
    let ids_buf = Buf::<B, u32>::host(b, &ids);
    let mut loss = Buf::<B, f32>::blank(b, first + rows + 2);
    let mut logits = Act::<B>::target(b, &numbers.around(0.0, width, rows * vocab));
    let values = logits.values();
    check.run(b, "cross_entropy", label.clone(), &[&ids_buf], || {
        b.cross_entropy(
            &mut loss.device,
            &mut logits.device,
            &ids_buf.device,
            first,
            rows,
            vocab,
            scale,
        )
    });
    let exact = |values: &[f64]| {
        let rows = values.chunks_exact(vocab).zip(&ids[first..]);
        rows.map(|(logits, &id)| row_exact(logits, id as usize, f64::from(scale)))
            .collect::<Vec<_>>()
    };
    check.expect(b, &loss, || {
        let mut losses = vec![Exact::UNTOUCHED; first];
        losses.extend(exact(&values).into_iter().map(|(loss, _)| loss));
        losses
    });
    check.expect(b, &logits, || {
        let rows = exact(&values).into_iter();
        rows.flat_map(|(_, gradient)| gradient).collect()
    });

    // With one word there is nothing to learn, and steep rows have hardly a gradient.
    if vocab == 1 || width > 1.0 {
        return;
    }
    let functional = |p: &[Vec<f64>]| {
        let losses = exact(&p[0]).into_iter().map(|(loss, _)| loss.value);
        f64::from(scale) * losses.sum::<f64>()
    };
    let own = |b: &B, p: &[Vec<f64>]| {
        let mut loss = Buf::<B, f32>::blank(b, first + rows);
        let mut logits = Act::<B>::target(b, &p[0]);
        b.cross_entropy(
            &mut loss.device,
            &mut logits.device,
            &ids_buf.device,
            first,
            rows,
            vocab,
            scale,
        )
        .unwrap();
        f64::from(scale) * loss.result(b)[first..].iter().sum::<f64>()
    };
    let gradient = logits.result(b);
    let op = "cross_entropy";
    check.gradient(b, op, label, &[&values], &[&gradient], functional, own);
}
