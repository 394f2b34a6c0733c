//! Rows moved by index: embedding, gather, scatter, key/value cache; columns of rows; rows of codes
//! widened.

use half::f16;

use super::threads::{Scattered, Threads};
use crate::backend::{AttentionLayout, Element};
use crate::quant::Bits;

pub fn embed<E: Element>(
    threads: &Threads,
    out: &mut [f32],
    table: &[E],
    ids: &[u32],
    rows: usize,
    cols: usize,
) {
    threads.rows(&mut out[..rows * cols], cols, |row, out| {
        E::widen(out, &table[ids[row] as usize * cols..][..cols]);
    });
}

pub fn embed_backward<E: Element>(
    threads: &Threads,
    dtable: &mut [f32],
    dout: &[E],
    ids: &[u32],
    rows: usize,
    cols: usize,
) {
    // Two tokens may share a row of the table, so tasks are cut by columns.
    const COLS: usize = 256;
    let dtable = Scattered::new(dtable);
    threads.tasks(cols.div_ceil(COLS), |task| {
        let first = task * COLS;
        let width = COLS.min(cols - first);
        for (row, &id) in ids[..rows].iter().enumerate() {
            // SAFETY: this task alone touches columns `first .. first + width`, one row at a time.
            let dtable = unsafe { dtable.at(id as usize * cols + first, width) };
            for (dtable, dout) in dtable.iter_mut().zip(&dout[row * cols + first..]) {
                *dtable += dout.to_f32();
            }
        }
    });
}

pub fn gather(threads: &Threads, out: &mut [f32], x: &[f32], index: &[u32], cols: usize) {
    threads.rows(&mut out[..index.len() * cols], cols, |row, out| {
        out.copy_from_slice(&x[index[row] as usize * cols..][..cols]);
    });
}

pub fn scatter<E: Element>(out: &mut [E], x: &[E], index: &[u32], cols: usize) {
    for (x, &row) in x.chunks_exact(cols).zip(index) {
        out[row as usize * cols..][..cols].copy_from_slice(x);
    }
}

pub fn put_columns<E: Element>(
    threads: &Threads,
    out: &mut [E],
    x: &[E],
    out_cols: usize,
    first: usize,
    cols: usize,
) {
    threads.rows(out, out_cols, |row, out| {
        out[first..first + cols].copy_from_slice(&x[row * cols..][..cols]);
    });
}

pub fn take_columns<E: Element>(
    threads: &Threads,
    out: &mut [E],
    x: &[E],
    x_cols: usize,
    first: usize,
    cols: usize,
) {
    threads.rows(out, cols, |row, out| {
        out.copy_from_slice(&x[row * x_cols + first..][..cols]);
    });
}

pub fn store_key_value<E: Element>(
    cache: &mut [E],
    x: &[E],
    slots: &[u32],
    layout: &AttentionLayout,
    rows: usize,
) {
    let dim = layout.head_dim;
    let width = layout.key_value_width();
    for (row, &slot) in slots[..rows].iter().enumerate() {
        let out = &mut cache[slot as usize * width..][..width];
        let (keys, values) = out.split_at_mut(width / 2);
        for (out, place) in [(keys, layout.key), (values, layout.value)] {
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let start = row * place.row + place.offset + head * place.stride;
                out.copy_from_slice(&x[start..start + dim]);
            }
        }
    }
}

pub fn dequantise<E: Element>(
    threads: &Threads,
    out: &mut [E],
    codes: &[i8],
    scales: &[f16],
    bits: Bits,
    cols: usize,
) {
    threads.rows(out, cols, |row, out| {
        let scale = scales[row].to_f32();
        // The product is exact in f32: 8 by 11 bits.
        let weight = |code: i8| E::from_f32(f16::from_f32(f32::from(code) * scale).to_f32());
        // A row of a model is long beside the codes there are: each is multiplied once.
        match bits {
            Bits::Eight => {
                let codes = &codes[row * cols..][..cols];
                if cols < 256 {
                    for (out, &code) in out.iter_mut().zip(codes) {
                        *out = weight(code);
                    }
                    return;
                }
                let weights: [E; 256] = std::array::from_fn(|byte| weight(byte as u8 as i8));
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = weights[usize::from(code as u8)];
                }
            }
            Bits::Four => {
                // An arithmetic shift brings the sign of the upper half down.
                let weights: [E; 16] = std::array::from_fn(|half| weight((half << 4) as i8 >> 4));
                let (pairs, _) = out.as_chunks_mut::<2>();
                for ([even, odd], &byte) in pairs.iter_mut().zip(&codes[row * cols / 2..]) {
                    let byte = usize::from(byte as u8);
                    (*even, *odd) = (weights[byte >> 4], weights[byte & 15]);
                }
            }
        }
    });
}
