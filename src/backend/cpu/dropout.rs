//! Dropout with counter-based random numbers.

use super::threads::Threads;
use crate::backend::{Dropout, Element, Span};
use crate::random;

/// Calls `work(column, mask)` for each column of a row; a mask is 0, or `1 / (1 - p)`.
fn each_column(
    dropout: Dropout,
    sequence: usize,
    row: usize,
    cols: usize,
    mut work: impl FnMut(usize, f32),
) {
    let keep = 1.0 / (1.0 - dropout.p);
    let key = dropout.key.fold(sequence as u64);
    for quad in 0..cols.div_ceil(4) {
        let words = key.words(row as u32, quad as u64);
        for (column, word) in (4 * quad..cols).zip(words) {
            let dropped = random::uniform(word) < dropout.p;
            work(column, if dropped { 0.0 } else { keep });
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
