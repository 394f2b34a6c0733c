//! Norms: launchers of kernels/norm.cu.

use half::f16;

use super::device::{Argument, Geometry, Kernel, Pointer};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, OpRooms, Result};
use crate::backend::{NormShape, RowGradient};

/// Kernels of the family.
pub(super) struct Kernels {
    layer_norm: Kernel,
    layer_norm_backward: Kernel,
    layer_norm_chunk_sums: Kernel,
    rms_norm: Kernel,
    rms_norm_backward: Kernel,
    rms_norm_chunk_sums: Kernel,
    add_chunks: Kernel,
    residual_layer_norm: Kernel,
    residual_rms_norm: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("norm.cu", name);
        Ok(Kernels {
            layer_norm: kernel("layer_norm")?,
            layer_norm_backward: kernel("layer_norm_backward")?,
            layer_norm_chunk_sums: kernel("layer_norm_chunk_sums")?,
            rms_norm: kernel("rms_norm")?,
            rms_norm_backward: kernel("rms_norm_backward")?,
            rms_norm_chunk_sums: kernel("rms_norm_chunk_sums")?,
            add_chunks: kernel("add_chunks")?,
            residual_layer_norm: kernel("residual_layer_norm")?,
            residual_rms_norm: kernel("residual_rms_norm")?,
        })
    }
}

/// Values that a thread takes at once.
fn width(cols: usize) -> u32 {
    if cols.is_multiple_of(4) { 4 } else { 1 }
}

/// A block per row, with as many threads as keep the row in registers, up to a limit.
fn row_blocks(shape: NormShape) -> Geometry {
    let threads = (shape.cols as u32).div_ceil(4 * width(shape.cols));
    Geometry::line(
        shape.rows as u32,
        threads.next_multiple_of(32).clamp(32, 512),
    )
}

/// `dout`, `residual` and `alpha` as the kernels take them.
fn parts(gradient: &RowGradient<'_, Cuda>) -> (Pointer, Pointer, f32) {
    let (residual, alpha) = match gradient.residual {
        Some((residual, alpha)) => (residual.at(), alpha),
        None => (Pointer::NULL, 0.0),
    };
    (gradient.dout.at(), residual, alpha)
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
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    cuda.device.launch(
        &cuda.norm.layer_norm,
        row_blocks(shape),
        &[out, stats, x, weight, bias, &rows, &cols, &shape.eps],
    )
}

pub(super) fn rms_norm(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    stats: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    weight: &CudaBuffer<f16>,
    shape: NormShape,
) -> Result<()> {
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    cuda.device.launch(
        &cuda.norm.rms_norm,
        row_blocks(shape),
        &[out, stats, x, weight, &rows, &cols, &shape.eps],
    )
}

#[allow(clippy::too_many_arguments)]
pub(super) fn residual_layer_norm(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    stats: &mut CudaBuffer<f32>,
    sum: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f16>,
    alpha: f32,
    branch: &CudaBuffer<f16>,
    weight: &CudaBuffer<f16>,
    bias: &CudaBuffer<f16>,
    shape: NormShape,
) -> Result<()> {
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    let arguments: [&dyn Argument; 11] = [
        out, stats, sum, x, &alpha, branch, weight, bias, &rows, &cols, &shape.eps,
    ];
    let kernel = &cuda.norm.residual_layer_norm;
    cuda.device.launch(kernel, row_blocks(shape), &arguments)
}

#[allow(clippy::too_many_arguments)]
pub(super) fn residual_rms_norm(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    stats: &mut CudaBuffer<f32>,
    sum: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    branch: &CudaBuffer<f16>,
    weight: &CudaBuffer<f16>,
    shape: NormShape,
) -> Result<()> {
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    cuda.device.launch(
        &cuda.norm.residual_rms_norm,
        row_blocks(shape),
        &[out, stats, sum, x, branch, weight, &rows, &cols, &shape.eps],
    )
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
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    let (dout, residual, alpha) = parts(&dout);
    cuda.device.launch(
        &cuda.norm.layer_norm_backward,
        row_blocks(shape),
        &[dx, &dout, &residual, &alpha, x, stats, weight, &rows, &cols],
    )
}

#[allow(clippy::too_many_arguments)]
pub(super) fn rms_norm_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    dout: &CudaBuffer<f16>,
    residual: Option<&CudaBuffer<f16>>,
    x: &CudaBuffer<f32>,
    stats: &CudaBuffer<f32>,
    weight: &CudaBuffer<f16>,
    shape: NormShape,
) -> Result<()> {
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    let residual = residual.map_or(Pointer::NULL, CudaBuffer::at);
    cuda.device.launch(
        &cuda.norm.rms_norm_backward,
        row_blocks(shape),
        &[dx, dout, &residual, x, stats, weight, &rows, &cols],
    )
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
    let sums = [dweight.at(), dbias.at()];
    let kernel = &cuda.norm.layer_norm_chunk_sums;
    let (dout, residual, alpha) = parts(&dout);
    let gradient: [&dyn Argument; 3] = [&dout, &residual, &alpha];
    sum_over_rows(cuda, &sums, kernel, &gradient, x, stats, shape)
}

pub(super) fn rms_norm_weight_gradient(
    cuda: &Cuda,
    dweight: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<f16>,
    x: &CudaBuffer<f32>,
    stats: &CudaBuffer<f32>,
    shape: NormShape,
) -> Result<()> {
    let kernel = &cuda.norm.rms_norm_chunk_sums;
    sum_over_rows(cuda, &[dweight.at()], kernel, &[dout], x, stats, shape)
}

/// Rows of a chunk that is summed by itself, at least; long enough that the partial sums are little
/// beside the rows.
const ROWS_PER_CHUNK: u32 = 32;
/// Chunks, at most: what bounds the scratch to 128 rows of float for each of `sums`.
const MOST_CHUNKS: u32 = 128;
const CHUNK_THREADS: u32 = 64;

/// Bytes of scratch for the largest micro-batch.
pub(super) fn scratch_bytes(rooms: &OpRooms) -> usize {
    let chunks = rooms.rows.div_ceil(ROWS_PER_CHUNK as usize);
    let chunks = chunks.min(MOST_CHUNKS as usize);
    chunks * 2 * rooms.hidden_size * size_of::<f32>()
}

/// `sums[i][h] += ` what `kernel` sums over the rows, chunk by chunk; `gradient` is what it takes as the
/// gradient of the norm's output.
fn sum_over_rows(
    cuda: &Cuda,
    sums: &[Pointer],
    kernel: &Kernel,
    gradient: &[&dyn Argument],
    x: &CudaBuffer<f32>,
    stats: &CudaBuffer<f32>,
    shape: NormShape,
) -> Result<()> {
    let (rows, cols) = (shape.rows as u32, shape.cols as u32);
    let rows_per_chunk = rows.div_ceil(MOST_CHUNKS).max(ROWS_PER_CHUNK);
    let chunks = rows.div_ceil(rows_per_chunk);
    let stride = sums.len() as u32 * cols;
    let row_bytes = shape.cols * size_of::<f32>();
    let partial = cuda.scratch(chunks as usize * sums.len() * row_bytes)?;
    let column_blocks = cols.div_ceil(CHUNK_THREADS * width(shape.cols));
    let geometry = Geometry {
        grid: [column_blocks, chunks, 1],
        ..Geometry::line(0, CHUNK_THREADS)
    };
    let mut arguments: Vec<&dyn Argument> = vec![&partial];
    arguments.extend_from_slice(gradient);
    arguments.extend_from_slice(&[x, stats, &rows, &cols, &rows_per_chunk]);
    cuda.device.launch(kernel, geometry, &arguments)?;
    for (index, out) in sums.iter().enumerate() {
        let first = partial.offset(index * row_bytes);
        cuda.device.launch(
            &cuda.norm.add_chunks,
            Geometry::line(cols.div_ceil(128), 128),
            &[out, &first, &chunks, &cols, &stride],
        )?;
    }
    Ok(())
}
