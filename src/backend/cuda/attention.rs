//! Attention: launchers of kernels/attention_forward, attention_backward.cu.

use half::f16;

use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::{AttentionLayout, Prefix, Span};

/// Kernels of the family.
pub(super) struct Kernels {}

impl Kernels {
    pub fn load(_modules: &Modules) -> Result<Self> {
        Ok(Kernels {})
    }
}

pub(super) fn store_key_value(
    cuda: &Cuda,
    cache: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    slots: &CudaBuffer<u32>,
    layout: &AttentionLayout,
    rows: usize,
) -> Result<()> {
    let _ = (cuda, cache, x, slots, layout, rows);
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn attention(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    lse: &mut CudaBuffer<f32>,
    query: &CudaBuffer<f16>,
    key_value: &CudaBuffer<f16>,
    prefix: Option<Prefix<'_, Cuda>>,
    layout: &AttentionLayout,
    spans: &[Span],
    scale: f32,
) -> Result<()> {
    let _ = (
        cuda, out, lse, query, key_value, prefix, layout, spans, scale,
    );
    unimplemented!()
}

#[allow(clippy::too_many_arguments)]
pub(super) fn attention_backward(
    cuda: &Cuda,
    dqkv: &mut CudaBuffer<f16>,
    dprefix: Option<&mut CudaBuffer<f32>>,
    dout: &CudaBuffer<f16>,
    out: &CudaBuffer<f16>,
    lse: &CudaBuffer<f32>,
    qkv: &CudaBuffer<f16>,
    prefix: Option<Prefix<'_, Cuda>>,
    layout: &AttentionLayout,
    spans: &[Span],
    scale: f32,
) -> Result<()> {
    let _ = (
        cuda, dqkv, dprefix, dout, out, lse, qkv, prefix, layout, spans, scale,
    );
    unimplemented!()
}
