//! Rows moved by index: embedding, gather, scatter, key/value cache.

use super::threads::{Scattered, Threads};
use crate::backend::{AttentionLayout, Element};

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
