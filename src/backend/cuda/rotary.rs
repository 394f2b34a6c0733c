//! Rotary embedding: launcher of kernels/rotary.cu.

use half::f16;

use super::device::{Argument, Geometry, Kernel};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::{AttentionLayout, RotaryPositions};

const THREADS: usize = 256;

/// Blocks of the grid-stride loop: more than any GPU runs at once.
const MOST_BLOCKS: usize = 1 << 16;

/// Kernels of the family; those by 8 elements are for heads on 16-byte borders.
pub(super) struct Kernels {
    by_8: Kernel,
    by_1: Kernel,
    interleaved_by_8: Kernel,
    interleaved_by_2: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("rotary.cu", name);
        Ok(Kernels {
            by_8: kernel("rotary_by_8")?,
            by_1: kernel("rotary_by_1")?,
            interleaved_by_8: kernel("rotary_interleaved_by_8")?,
            interleaved_by_2: kernel("rotary_interleaved_by_2")?,
        })
    }
}

/// `Rotary` of kernels/rotary.cu.
#[repr(C)]
struct Shape {
    rows: u32,
    row: u32,
    width: u32,
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
    positions: RotaryPositions<'_, Cuda>,
    layout: &AttentionLayout,
    rows: usize,
    inverse: bool,
) -> Result<()> {
    let (query, key) = (layout.query, layout.key);
    // Elements that are turned, and how many of them stand beside each other.
    let (width, together) = match positions {
        RotaryPositions::TwoDimensional { .. } => (layout.head_dim, layout.head_dim / 4),
        RotaryPositions::Interleaved { width, .. } => (width, width),
    };
    let places = [
        together,
        query.row,
        query.offset,
        query.stride,
        key.offset,
        key.stride,
    ];
    let by_8 = places.iter().all(|place| place % 8 == 0);
    let shape = Shape {
        rows: rows as u32,
        row: query.row as u32,
        width: width as u32,
        heads: layout.heads as u32,
        query_offset: query.offset as u32,
        query_stride: query.stride as u32,
        kv_heads: layout.kv_heads as u32,
        key_offset: key.offset as u32,
        key_stride: key.stride as u32,
        direction: if inverse { -1.0 } else { 1.0 },
    };
    let kernels = &cuda.rotary;
    let elements = rows * (layout.heads + layout.kv_heads) * width;
    let launch = |kernel: &Kernel, per_thread: usize, arguments: &[&dyn Argument]| {
        let blocks = (elements / per_thread).div_ceil(THREADS);
        let geometry = Geometry::line(blocks.min(MOST_BLOCKS) as u32, THREADS as u32);
        cuda.device.launch(kernel, geometry, arguments)
    };
    match positions {
        RotaryPositions::TwoDimensional {
            position,
            block_position,
        } => {
            let arguments: [&dyn Argument; 6] = [x, cos, sin, position, block_position, &shape];
            match by_8 {
                true => launch(&kernels.by_8, 16, &arguments),
                false => launch(&kernels.by_1, 2, &arguments),
            }
        }
        RotaryPositions::Interleaved { position, .. } => {
            let arguments: [&dyn Argument; 5] = [x, cos, sin, position, &shape];
            match by_8 {
                true => launch(&kernels.interleaved_by_8, 8, &arguments),
                false => launch(&kernels.interleaved_by_2, 2, &arguments),
            }
        }
    }
}
