//! Element by element: launchers of kernels/elementwise.cu.

use half::f16;

use super::device::{Argument, Geometry, Kernel};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::Element;

/// Kernels of the family.
pub(super) struct Kernels {
    cast_f16: Kernel,
    cast_f32: Kernel,
    add: Kernel,
    residual: Kernel,
    residual_sum: Kernel,
    gelu: Kernel,
    gelu_backward: Kernel,
    tanh: Kernel,
    tanh_backward: Kernel,
    swiglu: Kernel,
    swiglu_backward: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("elementwise.cu", name);
        Ok(Kernels {
            cast_f16: kernel("cast_f16")?,
            cast_f32: kernel("cast_f32")?,
            add: kernel("add")?,
            residual: kernel("residual")?,
            residual_sum: kernel("residual_sum")?,
            gelu: kernel("gelu")?,
            gelu_backward: kernel("gelu_backward")?,
            tanh: kernel("tanh_f32")?,
            tanh_backward: kernel("tanh_f32_backward")?,
            swiglu: kernel("swiglu")?,
            swiglu_backward: kernel("swiglu_backward")?,
        })
    }
}

const THREADS: u32 = 256;

/// Blocks of a flat list, at most; a thread of a longer one takes several pieces.
const MOST_BLOCKS: usize = 1 << 16;

/// A kernel over a flat list, whose threads take `width` values at once; `len` is its last argument.
pub(super) fn flat(
    cuda: &Cuda,
    kernel: &Kernel,
    width: usize,
    len: usize,
    buffers: &[&dyn Argument],
) -> Result<()> {
    let blocks = len.div_ceil(width * THREADS as usize).min(MOST_BLOCKS);
    let len = len as u64;
    let arguments: Vec<&dyn Argument> = buffers.iter().copied().chain([&len as _]).collect();
    let geometry = Geometry::line(blocks as u32, THREADS);
    cuda.device.launch(kernel, geometry, &arguments)
}

pub(super) fn cast<T: Element>(
    cuda: &Cuda,
    out: &mut CudaBuffer<T>,
    x: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    // The two storage types differ in size.
    let kernel = match T::SIZE {
        2 => &cuda.elementwise.cast_f16,
        _ => &cuda.elementwise.cast_f32,
    };
    flat(cuda, kernel, 4, len, &[out, x])
}

pub(super) fn add(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    flat(cuda, &cuda.elementwise.add, 4, len, &[out, x])
}

pub(super) fn residual(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f16>,
    alpha: f32,
    branch: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    let kernel = &cuda.elementwise.residual;
    flat(cuda, kernel, 4, len, &[out, x, &alpha, branch])
}

pub(super) fn residual_sum(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    branch: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    let kernel = &cuda.elementwise.residual_sum;
    flat(cuda, kernel, 4, len, &[out, x, branch])
}

pub(super) fn gelu(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    flat(cuda, &cuda.elementwise.gelu, 8, len, &[out, x])
}

pub(super) fn gelu_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    len: usize,
) -> Result<()> {
    flat(cuda, &cuda.elementwise.gelu_backward, 8, len, &[dx, x])
}

pub(super) fn tanh(cuda: &Cuda, x: &mut CudaBuffer<f32>, len: usize) -> Result<()> {
    flat(cuda, &cuda.elementwise.tanh, 4, len, &[x])
}

pub(super) fn tanh_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f32>,
    out: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    flat(cuda, &cuda.elementwise.tanh_backward, 4, len, &[dx, out])
}

/// Blocks over `rows` rows of `cols` columns, which threads take 8 at once where that fits.
fn over_rows(rows: usize, cols: usize) -> Geometry {
    let width = if cols.is_multiple_of(8) { 8 } else { 1 };
    let threads = cols.div_ceil(width).next_multiple_of(32);
    let threads = threads.clamp(32, THREADS as usize);
    let blocks = cols.div_ceil(width * threads) as u32;
    // A grid's second side is 16 bits wide; what is beyond it is strided over.
    let grid = [blocks, rows.min(0xffff) as u32, 1];
    Geometry {
        grid,
        ..Geometry::line(0, threads as u32)
    }
}

pub(super) fn swiglu(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    rows: usize,
    inner_hidden_size: usize,
) -> Result<()> {
    let geometry = over_rows(rows, inner_hidden_size);
    let (rows, inner) = (rows as u32, inner_hidden_size as u32);
    cuda.device
        .launch(&cuda.elementwise.swiglu, geometry, &[out, x, &rows, &inner])
}

pub(super) fn swiglu_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    dout: &CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    rows: usize,
    inner_hidden_size: usize,
) -> Result<()> {
    let geometry = over_rows(rows, inner_hidden_size);
    let (rows, inner) = (rows as u32, inner_hidden_size as u32);
    cuda.device.launch(
        &cuda.elementwise.swiglu_backward,
        geometry,
        &[dx, dout, x, &rows, &inner],
    )
}
