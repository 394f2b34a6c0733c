//! Loss: launchers of kernels/loss.cu.

use half::f16;

use super::device::{Geometry, Kernel};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};

/// Kernels of the family.
pub(super) struct Kernels {
    cross_entropy: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        Ok(Kernels {
            cross_entropy: modules.kernel("loss.cu", "cross_entropy")?,
        })
    }
}

/// `LOSS_THREADS` of kernels/loss.cu.
const THREADS: u32 = 512;

#[allow(clippy::too_many_arguments)]
pub(super) fn cross_entropy(
    cuda: &Cuda,
    loss: &mut CudaBuffer<f32>,
    logits: &mut CudaBuffer<f16>,
    ids: &CudaBuffer<u32>,
    first: usize,
    rows: usize,
    vocab_size: usize,
    scale: f32,
) -> Result<()> {
    debug_assert!(first + rows <= loss.len().min(ids.len()) && rows * vocab_size <= logits.len());
    cuda.device.launch(
        &cuda.loss.cross_entropy,
        Geometry::line(rows as u32, THREADS),
        &[
            loss,
            logits,
            ids,
            &(first as u32),
            &(vocab_size as u32),
            &scale,
        ],
    )
}
