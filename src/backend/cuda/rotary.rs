//! Rotary embedding: launchers of kernels/rotary.cu.

use half::f16;

use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::AttentionLayout;

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rotary(
    cuda: &Cuda,
    x: &mut CudaBuffer<f16>,
    cos: &CudaBuffer<f32>,
    sin: &CudaBuffer<f32>,
    position: &CudaBuffer<u32>,
    block_position: &CudaBuffer<u32>,
    layout: &AttentionLayout,
    rows: usize,
    inverse: bool,
) -> Result<()> {
    let _ = (
        cuda,
        x,
        cos,
        sin,
        position,
        block_position,
        layout,
        rows,
        inverse,
    );
    unimplemented!()
}
