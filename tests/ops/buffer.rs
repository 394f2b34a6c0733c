//! Device buffers with a guard behind their end and a copy of what they held.

use bytemuck::{bytes_of, pod_read_unaligned};
use mp_train::backend::{Backend, Element, Plain};

/// What stands behind inputs and in places to be written: a quiet NaN as f32 and (lower half) as f16,
/// no valid index as u32. Whatever is computed from it shows.
const POISON: u32 = 0x7fc0_7e5e;

/// What stands behind outputs: a number as f32 and as f16, so that even an op that adds poison to it,
/// or computes it in place, changes it.
const FENCE: u32 = 0xc640_e64b;

/// Elements behind the end.
const GUARD: usize = 67;

fn pattern<T: Plain>(bits: u32) -> T {
    pod_read_unaligned(&bits.to_le_bytes()[..size_of::<T>()])
}

/// A buffer that an op is given.
pub struct Buf<B: Backend, T: Plain> {
    pub device: B::Buffer<T>,
    /// What was uploaded, guard included.
    before: Vec<T>,
}

/// A buffer of weights or activations.
pub type Act<B> = Buf<B, <B as Backend>::Element>;

impl<B: Backend, T: Plain> Buf<B, T> {
    /// An input.
    pub fn host(backend: &B, values: &[T]) -> Self {
        Self::guarded(backend, values, pattern(POISON))
    }

    /// Values that the op changes.
    pub fn host_target(backend: &B, values: &[T]) -> Self {
        Self::guarded(backend, values, pattern(FENCE))
    }

    /// `len` places to be written, and not to be read.
    pub fn blank(backend: &B, len: usize) -> Self {
        Self::host_target(backend, &vec![pattern(POISON); len])
    }

    fn guarded(backend: &B, values: &[T], guard: T) -> Self {
        let mut before = values.to_vec();
        before.resize(values.len() + GUARD, guard);
        Buf {
            device: backend.upload(&before).unwrap(),
            before,
        }
    }

    pub fn before(&self) -> &[T] {
        &self.before
    }

    /// What it holds now, guard included.
    pub fn after(&self, backend: &B) -> Vec<T> {
        backend.read(&self.device, self.before.len()).unwrap()
    }
}

impl<B: Backend, T: Element> Buf<B, T> {
    /// An input: the values, rounded to the storage type.
    pub fn of(backend: &B, values: &[f64]) -> Self {
        Self::host(backend, &round(values))
    }

    /// The values, rounded, for an op that changes them.
    pub fn target(backend: &B, values: &[f64]) -> Self {
        Self::host_target(backend, &round(values))
    }

    /// What was uploaded, without the guard: rounded values.
    pub fn values(&self) -> Vec<f64> {
        widen(&self.before[..self.before.len() - GUARD])
    }

    /// What it holds now, without the guard.
    pub fn result(&self, backend: &B) -> Vec<f64> {
        widen(&self.after(backend)[..self.before.len() - GUARD])
    }
}

fn round<T: Element>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::from_f32(x as f32)).collect()
}

fn widen<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|x| f64::from(x.to_f32())).collect()
}

pub fn same_bits<T: Plain>(a: &T, b: &T) -> bool {
    bytes_of(a) == bytes_of(b)
}

/// An input of whatever type, to be found unchanged after the op.
pub trait Input<B: Backend> {
    fn unchanged(&self, backend: &B) -> bool;
}

impl<B: Backend, T: Plain> Input<B> for Buf<B, T> {
    fn unchanged(&self, backend: &B) -> bool {
        let after = self.after(backend);
        after.iter().zip(&self.before).all(|(a, b)| same_bits(a, b))
    }
}
