//! Rotary embedding: launcher of kernels/rotary.cu.

use half::f16;

use super::device::{Argument, Geometry, Kernel};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::AttentionLayout;

const THREADS: usize = 256;

/// Blocks of the grid-stride loop: more than any GPU runs at once.
const MOST_BLOCKS: usize = 1 << 16;

/// Kernels of the family.
pub(super) struct Kernels {
    by_8: Kernel,
    by_1: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        Ok(Kernels {
            by_8: modules.kernel("rotary.cu", "rotary_by_8")?,
            by_1: modules.kernel("rotary.cu", "rotary_by_1")?,
        })
    }
}

/// `Rotary` of kernels/rotary.cu.
#[repr(C)]
struct Shape {
    rows: u32,
    row: u32,
    head_dim: u32,
    heads: u32,
    query_offset: u32,
    query_stride: u32,
    kv_heads: u32,
    key_offset: u32,
    key_stride: u32,
    direction: f32,
}

// SAFETY: ten words in the order of the kernel's struct.
unsafe impl Argument for Shape {}

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
    let (query, key, quarter) = (layout.query, layout.key, layout.head_dim / 4);
    let places = [
        quarter,
        query.row,
        query.offset,
        query.stride,
        key.offset,
        key.stride,
    ];
    let (kernel, width) = match places.iter().all(|place| place % 8 == 0) {
        true => (&cuda.rotary.by_8, 8),
        false => (&cuda.rotary.by_1, 1),
    };
    let shape = Shape {
        rows: rows as u32,
        row: query.row as u32,
        head_dim: layout.head_dim as u32,
        heads: layout.heads as u32,
        query_offset: query.offset as u32,
        query_stride: query.stride as u32,
        kv_heads: layout.kv_heads as u32,
        key_offset: key.offset as u32,
        key_stride: key.stride as u32,
        direction: if inverse { -1.0 } else { 1.0 },
    };
    let pairs = rows * (layout.heads + layout.kv_heads) * 2 * quarter;
    let blocks = (pairs / width).div_ceil(THREADS);
    let geometry = Geometry::line(blocks.min(MOST_BLOCKS) as u32, THREADS as u32);
    cuda.device.launch(
        kernel,
        geometry,
        &[x, cos, sin, position, block_position, &shape],
    )
}
