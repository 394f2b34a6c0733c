//! The sequences of a micro-batch on the device, sent when they change and not with every op.

use std::cell::RefCell;

use super::device::Pointer;
use super::memory::CudaBuffer;
use super::{Cuda, Result};
use crate::backend::Span;

/// A table of rows of words that follows from the spans, and the spans it was made from.
pub(super) struct SpanTable {
    held: RefCell<Option<Held>>,
}

struct Held {
    spans: Vec<Span>,
    /// What else the table depends on.
    key: u32,
    rows: usize,
    device: CudaBuffer<u32>,
}

/// Words of a table that is not worth growing.
const LEAST_WORDS: usize = 256;
/// Words of a span on the device.
pub(super) const SPAN_WORDS: usize = 5;

/// Words that are taken for a table of `words` words.
pub(super) fn table_words(words: usize) -> usize {
    words.max(LEAST_WORDS)
}

/// A table on the device.
#[derive(Clone, Copy)]
pub(super) struct Table {
    pub at: Pointer,
    /// Number of rows.
    pub rows: u32,
}

impl SpanTable {
    pub fn new() -> Self {
        SpanTable {
            held: RefCell::new(None),
        }
    }

    /// Room for `words` words, so that no table up to there is a new allocation.
    pub fn reserve(&self, cuda: &Cuda, words: usize) -> Result<()> {
        *self.held.borrow_mut() = Some(Held {
            spans: Vec::new(),
            key: u32::MAX,
            rows: 0,
            device: cuda.memory.buffer(words)?,
        });
        Ok(())
    }

    /// The table for `spans` (and `key`), made by `make` unless it is the one made last. Good until
    /// the next call on the same object.
    pub fn get<const WORDS: usize>(
        &self,
        cuda: &Cuda,
        spans: &[Span],
        key: u32,
        make: impl FnOnce(&[Span]) -> Vec<[u32; WORDS]>,
    ) -> Result<Table> {
        let mut held = self.held.borrow_mut();
        match &*held {
            Some(held) if held.key == key && held.spans == spans => {
                return Ok(Table {
                    at: held.device.at(),
                    rows: held.rows as u32,
                });
            }
            _ => {}
        }
        let rows = make(spans);
        let words: &[u32] = bytemuck::cast_slice(&rows);
        let device = match held.take() {
            Some(held) if held.device.len() >= words.len() => held.device,
            // Twice as much as is needed now, so that growth ends soon.
            _ => cuda.memory.buffer(table_words(2 * words.len()))?,
        };
        cuda.staging
            .write(device.at(), bytemuck::cast_slice(words))?;
        let table = Table {
            at: device.at(),
            rows: rows.len() as u32,
        };
        *held = Some(Held {
            spans: spans.to_vec(),
            key,
            rows: rows.len(),
            device,
        });
        Ok(table)
    }
}

impl Cuda {
    /// The spans as `Span` of kernels/spans.cuh.
    pub(super) fn spans(&self, spans: &[Span]) -> Result<Table> {
        self.span_table.get(self, spans, 0, |spans| {
            let row = |span: &Span| -> [u32; SPAN_WORDS] {
                [
                    span.q_start,
                    span.q_len,
                    span.kv_start,
                    span.kv_len,
                    span.context_length,
                ]
                .map(|value| value as u32)
            };
            spans.iter().map(row).collect()
        })
    }
}
