//! The CPU backend: the readable reference, and what a person without a GPU runs.
//!
//! The program is built for any x86-64, whose vector registers hold 4 values; those of AVX2 hold 8, of
//! AVX-512 16. Functions marked `multiversion` are compiled for each, and the widest that the processor
//! has is taken at run time. They are loops over a piece or a row; what they call is `#[inline(always)]`,
//! since a call, a closure's too, stays compiled for any processor. All compute the same bits: no sum is
//! reordered, and no product joined with a sum into one rounding, unless the code says so. (Matrix
//! products are another matter: ours for AVX-512 and those of `gemm` sum in other orders.)

mod attention;
mod buffer;
mod dropout;
mod elementwise;
mod loss;
mod matmul;
mod norm;
mod operands;
mod ops;
mod optim;
mod reduce;
mod rms_norm;
mod rotary;
mod rows;
mod strips;
mod synthetic;
mod threads;
mod transpose;

use std::marker::PhantomData;
use std::sync::Arc;

pub use self::buffer::CpuBuffer;
use self::threads::Threads;
use super::{BackendError, Element, Measured, Measuring, Pulse};

/// The CPU, storing weights and activations as `E`, computing in f32.
pub struct Cpu<E> {
    threads: Threads,
    pulse: Arc<Pulse>,
    element: PhantomData<E>,
}

impl<E: Element> Cpu<E> {
    /// A CPU backend with its own `threads` compute threads.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, BackendError> {
        Self::with_pulse(threads, &Arc::default())
    }

    /// The same with signs of life.
    ///
    /// # Errors
    /// As [`Cpu::new`].
    pub fn with_pulse(threads: usize, pulse: &Arc<Pulse>) -> Result<Self, BackendError> {
        Ok(Cpu {
            threads: Threads::new(threads)?,
            pulse: Arc::clone(pulse),
            element: PhantomData,
        })
    }
}

impl<E: Element> Measuring for Cpu<E> {
    fn measure(&self) -> Result<(), BackendError> {
        self.threads.clock.start();
        Ok(())
    }

    fn stamp(&self) -> Result<(), BackendError> {
        self.threads.clock.stamp();
        Ok(())
    }

    fn measured(&self) -> Result<Measured, BackendError> {
        Ok(self.threads.clock.stop())
    }
}
