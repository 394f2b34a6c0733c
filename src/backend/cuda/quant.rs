//! Quantised weights: launchers of kernels/quant.cu.

use half::f16;

use super::device::Kernel;
use super::memory::CudaBuffer;
use super::module::Modules;
use super::rows::row_blocks;
use super::{Cuda, Result};
use crate::quant::Bits;

/// Kernels of the family.
pub(super) struct Kernels {
    dequantise_int8: Kernel,
    dequantise_int4: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        Ok(Kernels {
            dequantise_int8: modules.kernel("quant.cu", "dequantise_int8")?,
            dequantise_int4: modules.kernel("quant.cu", "dequantise_int4")?,
        })
    }
}

pub(super) fn dequantise(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    codes: &CudaBuffer<i8>,
    scales: &CudaBuffer<f16>,
    bits: Bits,
    rows: usize,
    cols: usize,
) -> Result<()> {
    let kernel = match bits {
        Bits::Eight => &cuda.quant.dequantise_int8,
        Bits::Four => &cuda.quant.dequantise_int4,
    };
    let geometry = row_blocks(rows, cols, 8);
    let cols = cols as u32;
    cuda.device
        .launch(kernel, geometry, &[out, codes, scales, &cols])
}
