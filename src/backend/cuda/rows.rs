//! Rows by index: launchers of kernels/rows.cu.

use half::f16;

use super::device::{Geometry, Kernel};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};

/// Kernels of the family.
pub(super) struct Kernels {
    embed: Kernel,
    embed_backward: Kernel,
    gather_rows: Kernel,
    scatter_rows: Kernel,
    copy_columns: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("rows.cu", name);
        Ok(Kernels {
            embed: kernel("embed")?,
            embed_backward: kernel("embed_backward")?,
            gather_rows: kernel("gather_rows")?,
            scatter_rows: kernel("scatter_rows")?,
            copy_columns: kernel("copy_columns")?,
        })
    }
}

/// A block per row, whose threads take `width` columns at once where that fits.
pub(super) fn row_blocks(rows: usize, cols: usize, width: usize) -> Geometry {
    let pieces = match cols.is_multiple_of(width) {
        true => cols / width,
        false => cols,
    };
    let threads = pieces.next_multiple_of(32).clamp(32, 256);
    Geometry::line(rows as u32, threads as u32)
}

pub(super) fn embed(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    table: &CudaBuffer<f16>,
    ids: &CudaBuffer<u32>,
    rows: usize,
    hidden_size: usize,
) -> Result<()> {
    let geometry = row_blocks(rows, hidden_size, 4);
    let cols = hidden_size as u32;
    cuda.device
        .launch(&cuda.rows.embed, geometry, &[out, table, ids, &cols])
}

pub(super) fn embed_backward(
    cuda: &Cuda,
    dtable: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<f16>,
    ids: &CudaBuffer<u32>,
    rows: usize,
    hidden_size: usize,
) -> Result<()> {
    const THREADS: u32 = 256;
    let (rows, cols) = (rows as u32, hidden_size as u32);
    // A thread keeps four pieces.
    let width = if cols.is_multiple_of(4) { 4 } else { 1 };
    let geometry = Geometry {
        grid: [rows, cols.div_ceil(4 * width * THREADS), 1],
        ..Geometry::line(0, THREADS)
    };
    cuda.device.launch(
        &cuda.rows.embed_backward,
        geometry,
        &[dtable, dout, ids, &rows, &cols],
    )
}

pub(super) fn gather_rows(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    x: &CudaBuffer<f32>,
    index: &CudaBuffer<u32>,
    first: usize,
    rows: usize,
    cols: usize,
) -> Result<()> {
    let geometry = row_blocks(rows, cols, 4);
    let (index, cols) = (index.at_index(first), cols as u32);
    cuda.device
        .launch(&cuda.rows.gather_rows, geometry, &[out, x, &index, &cols])
}

pub(super) fn scatter_rows(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    index: &CudaBuffer<u32>,
    first: usize,
    rows: usize,
    cols: usize,
) -> Result<()> {
    let geometry = row_blocks(rows, cols, 8);
    let (index, cols) = (index.at_index(first), cols as u32);
    cuda.device
        .launch(&cuda.rows.scatter_rows, geometry, &[out, x, &index, &cols])
}

pub(super) fn put_columns(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    rows: usize,
    out_cols: usize,
    first: usize,
    cols: usize,
) -> Result<()> {
    copy_columns(cuda, out, x, rows, [out_cols, first], [cols, 0], cols)
}

pub(super) fn take_columns(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    rows: usize,
    x_cols: usize,
    first: usize,
    cols: usize,
) -> Result<()> {
    copy_columns(cuda, out, x, rows, [cols, 0], [x_cols, first], cols)
}

/// Columns of `x` into columns of `out`; of both, the width of a row and the first column.
fn copy_columns(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    rows: usize,
    out_place: [usize; 2],
    x_place: [usize; 2],
    cols: usize,
) -> Result<()> {
    let geometry = row_blocks(rows, cols, 8);
    let [out_cols, out_first] = out_place.map(|value| value as u32);
    let [x_cols, x_first] = x_place.map(|value| value as u32);
    cuda.device.launch(
        &cuda.rows.copy_columns,
        geometry,
        &[
            out,
            x,
            &out_cols,
            &out_first,
            &x_cols,
            &x_first,
            &(cols as u32),
        ],
    )
}
