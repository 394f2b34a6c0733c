//! Low-rank products of LoRA: launchers of kernels/adapter.cu.

use super::device::Pointer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::LinearShape;

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

/// Largest rank that the kernels take.
pub(super) const MAX_RANK: usize = 64;

/// `out [T, O] = scale * x [T, I] weight [O, I]ᵀ`, added to `out` when `accumulate`; `operands` are out,
/// x and weight.
pub(super) fn forward(
    cuda: &Cuda,
    operands: (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    let _ = (cuda, operands, shape, scale, accumulate);
    unimplemented!()
}

/// `dx [T, I] = scale * dout [T, O] weight [O, I]`; `operands` are dx, dout and weight.
pub(super) fn backward(
    cuda: &Cuda,
    operands: (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    let _ = (cuda, operands, shape, scale, accumulate);
    unimplemented!()
}

/// `dweight [O, I] += scale * doutᵀ x`, f32; `operands` are dweight, dout and x.
pub(super) fn weight_gradient(
    cuda: &Cuda,
    operands: (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
) -> Result<()> {
    let _ = (cuda, operands, shape, scale);
    unimplemented!()
}
