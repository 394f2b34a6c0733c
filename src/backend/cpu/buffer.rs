//! Buffers of the CPU backend.

use std::ops::{Deref, DerefMut};

use crate::backend::{BackendError, Plain};

/// Host memory.
pub struct CpuBuffer<T>(Vec<T>);

impl<T: Plain> CpuBuffer<T> {
    /// A buffer of `len` zeros; too much of them is an error, not an abort.
    pub(super) fn zeros(len: usize) -> Result<Self, BackendError> {
        let mut values = Vec::new();
        values
            .try_reserve_exact(len)
            .map_err(|_| BackendError::OutOfMemory {
                device: "cpu".to_owned(),
                bytes: len.saturating_mul(size_of::<T>()),
            })?;
        values.resize(len, T::zeroed());
        Ok(CpuBuffer(values))
    }
}

impl<T> Deref for CpuBuffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for CpuBuffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}
