//! Dropout: launchers of kernels/dropout.cu.

use half::f16;

use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::{Dropout, Span};

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

pub(super) fn prefix_dropout(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    dropout: Dropout,
    sequences: usize,
    prefix_len: usize,
    cols: usize,
) -> Result<()> {
    let _ = (cuda, out, x, dropout, sequences, prefix_len, cols);
    unimplemented!()
}

pub(super) fn prefix_gradient(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<f32>,
    dropout: Option<Dropout>,
    sequences: usize,
    prefix_len: usize,
    cols: usize,
) -> Result<()> {
    let _ = (cuda, dx, dout, dropout, sequences, prefix_len, cols);
    unimplemented!()
}

pub(super) fn dropout(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) -> Result<()> {
    let _ = (cuda, out, x, dropout, spans, cols);
    unimplemented!()
}

pub(super) fn dropout_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    dout: &CudaBuffer<f16>,
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) -> Result<()> {
    let _ = (cuda, dx, dout, dropout, spans, cols);
    unimplemented!()
}
