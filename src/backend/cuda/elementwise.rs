//! Element by element: launchers of kernels/elementwise.cu.

use half::f16;

use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::Element;

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

pub(super) fn cast<T: Element>(
    cuda: &Cuda,
    out: &mut CudaBuffer<T>,
    x: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    let _ = (cuda, out, x, len);
    unimplemented!()
}

pub(super) fn add(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    let _ = (cuda, out, x, len);
    unimplemented!()
}

pub(super) fn gelu(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    let _ = (cuda, out, x, len);
    unimplemented!()
}

pub(super) fn gelu_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    let _ = (cuda, dx, x, len);
    unimplemented!()
}

pub(super) fn tanh(cuda: &Cuda, x: &mut CudaBuffer<f32>, len: usize) -> Result<()> {
    let _ = (cuda, x, len);
    unimplemented!()
}

pub(super) fn tanh_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f32>,
    out: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    let _ = (cuda, dx, out, len);
    unimplemented!()
}

pub(super) fn residual(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f16>,
    alpha: f32,
    branch: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    let _ = (cuda, out, x, alpha, branch, len);
    unimplemented!()
}
