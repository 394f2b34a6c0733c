//! Dropout with counter-based random numbers.

use super::threads::Threads;
use crate::backend::{Dropout, Element, Span};
use crate::random;

/// Four mask values at a time: 0, or `1 / (1 - p)`.
fn mask(dropout: Dropout, sequence: u32, row: u32, quad: u32) -> [f32; 4] {
    let keep = 1.0 / (1.0 - dropout.p);
    random::philox([quad, row, sequence, 0], dropout.key).map(|word| {
        if random::uniform(word) < dropout.p {
            0.0
        } else {
            keep
        }
    })
}

/// Calls `work(column, mask)` for each column of a row.
fn each_column(
    dropout: Dropout,
    sequence: usize,
    row: usize,
    cols: usize,
    mut work: impl FnMut(usize, f32),
) {
    for quad in 0..cols.div_ceil(4) {
        let masks = mask(dropout, sequence as u32, row as u32, quad as u32);
        for (column, mask) in (4 * quad..cols).zip(masks) {
            work(column, mask);
        }
    }
}

/// For each row of a flat micro-batch: its sequence, and its place in that sequence.
fn places(spans: &[Span]) -> Vec<(usize, usize)> {
    spans
        .iter()
        .enumerate()
        .flat_map(|(sequence, span)| (0..span.q_len).map(move |token| (sequence, token)))
        .collect()
}

pub fn dropout<E: Element>(
    threads: &Threads,
    out: &mut [E],
    x: &[E],
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) {
    let places = places(spans);
    threads.rows(&mut out[..places.len() * cols], cols, |row, out| {
        let (sequence, token) = places[row];
        let x = &x[row * cols..][..cols];
        each_column(dropout, sequence, token, cols, |column, mask| {
            out[column] = E::from_f32(mask * x[column].to_f32());
        });
    });
}

pub fn dropout_backward<E: Element>(
    threads: &Threads,
    dx: &mut [E],
    dout: &[E],
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) {
    let places = places(spans);
    threads.rows(&mut dx[..places.len() * cols], cols, |row, dx| {
        let (sequence, token) = places[row];
        let dout = &dout[row * cols..][..cols];
        each_column(dropout, sequence, token, cols, |column, mask| {
            dx[column] = E::from_f32(dx[column].to_f32() + mask * dout[column].to_f32());
        });
    });
}

pub fn prefix_dropout<E: Element>(
    threads: &Threads,
    out: &mut [E],
    x: &[E],
    dropout: Dropout,
    prefix_len: usize,
    cols: usize,
) {
    threads.rows(out, cols, |row, out| {
        let (sequence, position) = (row / prefix_len, row % prefix_len);
        let x = &x[position * cols..][..cols];
        each_column(dropout, sequence, position, cols, |column, mask| {
            out[column] = E::from_f32(mask * x[column].to_f32());
        });
    });
}

pub fn prefix_gradient(
    threads: &Threads,
    dx: &mut [f32],
    dout: &[f32],
    dropout: Option<Dropout>,
    sequences: usize,
    cols: usize,
) {
    let len = dx.len();
    threads.rows(dx, cols, |position, dx| {
        for sequence in 0..sequences {
            let dout = &dout[sequence * len + position * cols..][..cols];
            match dropout {
                None => {
                    for (dx, dout) in dx.iter_mut().zip(dout) {
                        *dx += dout;
                    }
                }
                Some(dropout) => each_column(dropout, sequence, position, cols, |column, mask| {
                    dx[column] += mask * dout[column];
                }),
            }
        }
    });
}
