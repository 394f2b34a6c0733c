//! Buffers of the CPU backend.

use std::ops::{Deref, DerefMut};

use super::threads::Threads;
use crate::backend::{BackendError, Plain, piece_len};

/// Host memory.
pub struct CpuBuffer<T>(Vec<T>);

impl<T: Plain> CpuBuffer<T> {
    /// A buffer of `len` zeros; too much of them is an error, not an abort.
    pub(super) fn zeros(len: usize) -> Result<Self, BackendError> {
        let mut values = Vec::new();
        values
            .try_reserve_exact(len)
            .map_err(|_| out_of_memory::<T>(len))?;
        values.resize(len, T::zeroed());
        Ok(CpuBuffer(values))
    }

    /// The same for values that are overwritten at once: the system's own zeros, which cost nothing
    /// until then.
    pub(super) fn untouched(len: usize) -> Result<Self, BackendError> {
        match bytemuck::allocation::try_zeroed_vec(len) {
            Ok(values) => Ok(CpuBuffer(values)),
            Err(()) => Err(out_of_memory::<T>(len)),
        }
    }

    /// As [`Backend::upload_pieces`](crate::backend::Backend::upload_pieces).
    pub(super) fn from_pieces<E: From<BackendError> + Send>(
        threads: &Threads,
        len: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [T]) -> Result<(), E> + Sync,
    ) -> Result<Self, E> {
        let mut buffer = CpuBuffer::untouched(len)?;
        threads.try_pieces(&mut buffer, piece_len::<T>(unit), fill)?;
        Ok(buffer)
    }
}

fn out_of_memory<T>(len: usize) -> BackendError {
    BackendError::OutOfMemory {
        device: "cpu".to_owned(),
        bytes: len.saturating_mul(size_of::<T>()),
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
