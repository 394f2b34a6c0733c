//! Norms: launchers of kernels/norm.cu.

use half::f16;

use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::{NormShape, RowGradient};

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

pub(super) fn layer_norm(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    stats: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    weight: &CudaBuffer<f16>,
    bias: &CudaBuffer<f16>,
    shape: NormShape,
) -> Result<()> {
    let _ = (cuda, out, stats, x, weight, bias, shape);
    unimplemented!()
}

pub(super) fn layer_norm_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    dout: RowGradient<'_, Cuda>,
    x: &CudaBuffer<f32>,
    stats: &CudaBuffer<f32>,
    weight: &CudaBuffer<f16>,
    shape: NormShape,
) -> Result<()> {
    let _ = (cuda, dx, dout, x, stats, weight, shape);
    unimplemented!()
}

pub(super) fn layer_norm_weight_gradient(
    cuda: &Cuda,
    dweight: &mut CudaBuffer<f32>,
    dbias: &mut CudaBuffer<f32>,
    dout: RowGradient<'_, Cuda>,
    x: &CudaBuffer<f32>,
    stats: &CudaBuffer<f32>,
    shape: NormShape,
) -> Result<()> {
    let _ = (cuda, dweight, dbias, dout, x, stats, shape);
    unimplemented!()
}
