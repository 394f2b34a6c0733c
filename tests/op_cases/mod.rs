//! Ops at the shapes of a model, each with the bytes and operations that it cannot do without: what
//! tests/kernel_traffic.rs counts against and tests/op_speed.rs times.

#![allow(dead_code, clippy::unwrap_used)]

mod heads;
mod lines;
mod products;

use std::sync::atomic::{AtomicBool, Ordering};

use mp_train::backend::{Backend, BackendError, Element, Plain};

/// Sizes of a model and of a micro-batch.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Sizes {
    /// T, tokens: one sequence where nothing else is said.
    pub rows: usize,
    /// H.
    pub hidden_size: usize,
    /// N.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
    /// F.
    pub inner_hidden_size: usize,
    /// V.
    pub vocab_size: usize,
    /// r.
    pub rank: usize,
    /// Rows that have a target, half of a micro-batch.
    pub target_rows: usize,
    /// Blocks, each of which has a pair of LoRA matrices at query_key_value.
    pub blocks: usize,
}

impl Sizes {
    /// ChatGLM-6B with 1 x 1024 tokens.
    pub const CHATGLM_6B: Sizes = Sizes {
        rows: 1024,
        hidden_size: 4096,
        heads: 32,
        head_dim: 128,
        inner_hidden_size: 16_384,
        vocab_size: 130_528,
        rank: 8,
        target_rows: 512,
        blocks: 28,
    };

    /// Its proportions, small enough for an emulated GPU to count every access.
    pub const TRAFFIC: Sizes = Sizes {
        rows: 128,
        hidden_size: 512,
        heads: 4,
        head_dim: 128,
        inner_hidden_size: 2048,
        vocab_size: 4096,
        rank: 8,
        target_rows: 64,
        blocks: 2,
    };

    /// As little as all ops still have work with.
    pub const TINY: Sizes = Sizes {
        rows: 65,
        hidden_size: 64,
        heads: 4,
        head_dim: 16,
        inner_hidden_size: 96,
        vocab_size: 97,
        rank: 3,
        target_rows: 33,
        blocks: 1,
    };
}

/// What bounds an op on a GPU, and so the rate that it is judged by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// Large matrix products: operations per second.
    Products,
    /// Attention: operations per second.
    Attention,
    /// All else: bytes per second.
    Memory,
}

/// What an op cannot do without: each operand moved once.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Work {
    /// Bytes of what is read.
    pub read: u64,
    /// Bytes of what is written.
    pub written: u64,
    /// Floating-point operations of products, a multiplication and an addition as two.
    pub flops: u64,
    /// Values of the operand that it goes through: those of which a byte count is told.
    pub elements: u64,
}

impl Work {
    /// Bytes read and written for `elements` values.
    fn over(elements: usize, read: usize, written: usize) -> Self {
        Work {
            read: read as u64,
            written: written as u64,
            flops: 0,
            elements: elements as u64,
        }
    }

    fn with_flops(self, flops: usize) -> Self {
        Work {
            flops: flops as u64,
            ..self
        }
    }
}

/// Queues an op once.
pub type Run<B> = dyn FnMut(&B) -> Result<(), BackendError>;

/// One op, ready to run as often as wanted.
pub struct Case<B: Backend> {
    pub name: String,
    pub bound: Bound,
    pub work: Work,
    /// Why its kernels ask for more bytes than `work` says, or touch more; empty: they do not.
    pub note: &'static str,
    pub run: Box<Run<B>>,
}

/// What is done with a case.
pub type Visit<'a, B> = dyn FnMut(&B, Case<B>) + 'a;

/// Sequences of equal length: how many, and how long.
pub type Batch = (usize, usize);

/// Every case in turn, of which only one holds memory at a time: all ops at `sizes`, and attention over
/// `batches`.
pub fn visit<B: Backend>(b: &B, sizes: &Sizes, batches: &[Batch], visit: &mut Visit<'_, B>) {
    products::visit(b, sizes, visit);
    heads::visit(b, sizes, batches, visit);
    lines::visit(b, sizes, visit);
}

/// Buffers hold zeros: for launches that do not run.
pub static BLANK: AtomicBool = AtomicBool::new(false);

/// Values between -1 and 1, the same for the same length; the mean of their squares is 1/3.
fn value(index: usize) -> f32 {
    let word = (index as u32).wrapping_mul(0x9E37_79B9).rotate_left(15) ^ 0x5bd1_e995;
    (word.wrapping_mul(0x85eb_ca6b) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

/// A buffer of `len` values of some size around 0, in the storage type.
fn elements<B: Backend, T: Element>(b: &B, len: usize, size: f32) -> B::Buffer<T> {
    filled(b, len, |index| T::from_f32(size * value(index)))
}

fn filled<B: Backend, T: Plain>(b: &B, len: usize, of: impl Fn(usize) -> T + Sync) -> B::Buffer<T> {
    if BLANK.load(Ordering::Relaxed) {
        return b.zeros(len).unwrap();
    }
    let buffer = b.upload_pieces(len, 1, |first, piece: &mut [T]| {
        for (i, place) in piece.iter_mut().enumerate() {
            *place = of(first + i);
        }
        Ok::<(), BackendError>(())
    });
    buffer.unwrap()
}

/// Different rows of a list of `of`, in no order.
fn picked(count: usize, of: usize) -> Vec<u32> {
    // Steps that share no factor with the length come to every row once.
    let step = (of / 3..of).find(|&step| common_factor(step, of) == 1);
    let step = step.unwrap_or(1).max(1);
    (0..count).map(|i| (i * step % of) as u32).collect()
}

fn common_factor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { common_factor(b, a % b) }
}

/// Bytes of values of the storage type.
fn stored<B: Backend>(len: usize) -> usize {
    len * B::Element::SIZE
}

/// Bytes of f32 or u32 values.
fn words(len: usize) -> usize {
    4 * len
}

/// Hands a case of [`Bound::Memory`] on.
fn memory<B: Backend>(
    b: &B,
    visit: &mut Visit<'_, B>,
    name: &str,
    work: Work,
    note: &'static str,
    run: impl FnMut(&B) -> Result<(), BackendError> + 'static,
) {
    visit(
        b,
        Case {
            name: name.to_owned(),
            bound: Bound::Memory,
            work,
            note,
            run: Box::new(run),
        },
    );
}
