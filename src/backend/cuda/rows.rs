//! Rows by index: launchers of kernels/rows.cu.

use half::f16;

use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

pub(super) fn embed(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    table: &CudaBuffer<f16>,
    ids: &CudaBuffer<u32>,
    rows: usize,
    hidden_size: usize,
) -> Result<()> {
    let _ = (cuda, out, table, ids, rows, hidden_size);
    unimplemented!()
}

pub(super) fn embed_backward(
    cuda: &Cuda,
    dtable: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<f16>,
    ids: &CudaBuffer<u32>,
    rows: usize,
    hidden_size: usize,
) -> Result<()> {
    let _ = (cuda, dtable, dout, ids, rows, hidden_size);
    unimplemented!()
}

pub(super) fn gather_rows(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    index: &CudaBuffer<u32>,
    first: usize,
    rows: usize,
    cols: usize,
) -> Result<()> {
    let _ = (cuda, out, x, index, first, rows, cols);
    unimplemented!()
}

pub(super) fn scatter_rows(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    index: &CudaBuffer<u32>,
    first: usize,
    rows: usize,
    cols: usize,
) -> Result<()> {
    let _ = (cuda, out, x, index, first, rows, cols);
    unimplemented!()
}
