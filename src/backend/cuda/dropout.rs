//! Dropout: launchers of kernels/dropout.cu.

use half::f16;

use super::device::{Geometry, Kernel};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::{Dropout, Span};

/// Kernels of the family.
pub(super) struct Kernels {
    dropout: Kernel,
    dropout_backward: Kernel,
    prefix_dropout: Kernel,
    prefix_gradient: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("dropout.cu", name);
        Ok(Kernels {
            dropout: kernel("dropout")?,
            dropout_backward: kernel("dropout_backward")?,
            prefix_dropout: kernel("prefix_dropout")?,
            prefix_gradient: kernel("prefix_gradient")?,
        })
    }
}

/// `DROPOUT_THREADS` of kernels/dropout.cu.
const THREADS: u32 = 256;

/// What the kernels take of a dropout: both words of the key, p, and the mask of what is kept, divided
/// here so that it has the bits of the CPU backend's.
fn arguments(dropout: Dropout) -> (u32, u32, f32, f32) {
    let [low, high] = dropout.key.to_words();
    (low, high, dropout.p, 1.0 / (1.0 - dropout.p))
}

pub(super) fn prefix_dropout(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    dropout: Dropout,
    sequences: usize,
    prefix_len: usize,
    cols: usize,
) -> Result<()> {
    let rows = sequences * prefix_len;
    debug_assert!(rows * cols <= out.len() && prefix_len * cols <= x.len());
    let (low, high, p, keep) = arguments(dropout);
    cuda.device.launch(
        &cuda.dropout.prefix_dropout,
        Geometry::line(rows as u32, THREADS),
        &[
            out,
            x,
            &(prefix_len as u32),
            &(cols as u32),
            &low,
            &high,
            &p,
            &keep,
        ],
    )
}

pub(super) fn prefix_gradient(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<f32>,
    dropout: Option<Dropout>,
    sequences: usize,
    prefix_len: usize,
    cols: usize,
) -> Result<()> {
    let len = prefix_len * cols;
    debug_assert!(len <= dx.len() && sequences * len <= dout.len());
    // Without dropout every mask is 1.
    let (low, high, p, keep) = dropout.map_or((0, 0, 0.0, 1.0), arguments);
    let column_blocks = (cols as u32).div_ceil(4 * THREADS);
    let geometry = Geometry {
        grid: [prefix_len as u32, column_blocks, 1],
        threads: THREADS,
        shared: 0,
    };
    cuda.device.launch(
        &cuda.dropout.prefix_gradient,
        geometry,
        &[
            dx,
            dout,
            &(sequences as u32),
            &(prefix_len as u32),
            &(cols as u32),
            &low,
            &high,
            &p,
            &keep,
        ],
    )
}

pub(super) fn dropout(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) -> Result<()> {
    rows(cuda, &cuda.dropout.dropout, (out, x), dropout, spans, cols)
}

pub(super) fn dropout_backward(
    cuda: &Cuda,
    dx: &mut CudaBuffer<f16>,
    dout: &CudaBuffer<f16>,
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) -> Result<()> {
    let kernel = &cuda.dropout.dropout_backward;
    rows(cuda, kernel, (dx, dout), dropout, spans, cols)
}

/// A block for each query row of the spans.
fn rows(
    cuda: &Cuda,
    kernel: &Kernel,
    (out, x): (&mut CudaBuffer<f16>, &CudaBuffer<f16>),
    dropout: Dropout,
    spans: &[Span],
    cols: usize,
) -> Result<()> {
    let rows: usize = spans.iter().map(|span| span.q_len).sum();
    debug_assert!(rows * cols <= out.len().min(x.len()));
    let (low, high, p, keep) = arguments(dropout);
    let table = cuda.spans(spans)?;
    cuda.device.launch(
        kernel,
        Geometry::line(rows as u32, THREADS),
        &[
            out,
            x,
            &table.at,
            &table.rows,
            &(cols as u32),
            &low,
            &high,
            &p,
            &keep,
        ],
    )
}
