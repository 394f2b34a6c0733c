//! The CUDA backend: our kernels (kernels/*.cu) and cuBLASLt on one GPU per worker thread.
//!
//! Reading order: [`Cuda`] below; `device` (context, stream, launch), `memory` and `staging`; `library`,
//! `source`, `compile`, `cache` and `module`, which bring the kernels onto the device; then one file
//! per family of kernels, named as its source.

mod adapter;
mod attention;
mod blas;
mod cache;
mod compile;
mod device;
mod dropout;
mod elementwise;
mod error;
mod events;
mod library;
mod linear;
mod loss;
mod memory;
mod module;
mod nccl_library;
mod norm;
mod optim;
mod prepare;
mod probe;
mod quant;
mod rotary;
mod rows;
mod source;
mod spans;
mod staging;
mod survey;
mod tiles;

use std::rc::Rc;
use std::sync::Arc;

use half::f16;

pub use compile::{Compiled, compile_kernels, nvrtc};
pub use error::CudaError;
pub use events::{DevicePlace, Event, SideStream};
pub use memory::{ALIGNMENT, CudaBuffer};
pub use nccl_library::{NcclLibrary, nccl};
pub use prepare::{LinearWork, MemoryPlan, NCCL_MEMORY_PER_PEER, OWN_MEMORY, OpRooms};
pub use probe::{PeerCopies, peer_copies, probe, probe_by};
pub use survey::{GpuInfo, Survey, check, free_memory, survey, visible};

use super::{
    AdamwStep, AdamwTensor, AttentionLayout, Backend, BackendError, Dropout, Element, LinearShape,
    MemoryUse, NormShape, Plain, Prefix, Pulse, RowGradient, Span, SumOf, piece_len,
};
use crate::quant::Bits;
use device::{Device, Pointer};
use memory::{Memory, Scratch};
use module::Modules;
use spans::SpanTable;
use staging::Staging;

type Result<T> = std::result::Result<T, BackendError>;

/// A GPU, storing weights and activations as f16, computing in f32.
///
/// Everything is queued on one stream in the order of the calls; only [`Backend::read`] waits.
pub struct Cuda {
    blas: blas::Blas,
    norm: norm::Kernels,
    elementwise: elementwise::Kernels,
    rows: rows::Kernels,
    linear: linear::Kernels,
    adapter: adapter::Kernels,
    rotary: rotary::Kernels,
    attention: attention::Kernels,
    dropout: dropout::Kernels,
    loss: loss::Kernels,
    optim: optim::Kernels,
    quant: quant::Kernels,
    span_table: SpanTable,
    scratch: Scratch,
    staging: Staging,
    memory: Memory,
    /// After everything that launches from them.
    _modules: Modules,
    device: Rc<Device>,
}

impl Cuda {
    /// The GPU with CUDA's number `ordinal`, for the thread that calls.
    ///
    /// # Errors
    /// Driver or libraries are missing or too old, there is no such GPU, it is too old, or a kernel
    /// does not compile.
    pub fn new(ordinal: u32) -> Result<Self> {
        Cuda::with_pulse(ordinal, &Arc::default())
    }

    /// The same with signs of life: kernels compiled, marks reached. Every wait for the GPU ends when the
    /// pulse is stopped.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_pulse(ordinal: u32, pulse: &Arc<Pulse>) -> Result<Self> {
        Cuda::open(ordinal, pulse, None)
    }

    /// The GPU; with a plan, all its memory is taken at once, after the kernels and before all else.
    fn open(ordinal: u32, pulse: &Arc<Pulse>, plan: Option<&MemoryPlan>) -> Result<Self> {
        let device = Device::open(ordinal, pulse).map_err(BackendError::Cuda)?;
        let device = Rc::new(device);
        let modules = Modules::load(&device)?;
        let memory = Memory::new(&device);
        if let Some(MemoryPlan { buffers, rooms }) = plan {
            let bytes = buffers + rooms.bytes(Some(device.capability()));
            memory.reserve(bytes as usize)?;
        }
        Ok(Cuda {
            blas: blas::Blas::new(&device, &memory)?,
            norm: norm::Kernels::load(&modules)?,
            elementwise: elementwise::Kernels::load(&modules)?,
            rows: rows::Kernels::load(&modules)?,
            linear: linear::Kernels::load(&modules)?,
            adapter: adapter::Kernels::load(&modules)?,
            rotary: rotary::Kernels::load(&modules)?,
            attention: attention::Kernels::load(&modules, device.capability())?,
            dropout: dropout::Kernels::load(&modules)?,
            loss: loss::Kernels::load(&modules)?,
            optim: optim::Kernels::load(&modules)?,
            quant: quant::Kernels::load(&modules)?,
            span_table: SpanTable::new(),
            scratch: Scratch::new(),
            staging: Staging::new(&device)?,
            memory,
            _modules: modules,
            device,
        })
    }

    /// At least `bytes` bytes of room for one op, with whatever is in them; good until the next call.
    fn scratch(&self, bytes: usize) -> Result<Pointer> {
        self.scratch.get(&self.memory, bytes)
    }
}

impl Backend for Cuda {
    type Element = f16;
    type Buffer<T: Plain> = CudaBuffer<T>;

    fn mark(&self, place: u64) -> Result<()> {
        self.device.mark(place)
    }

    fn memory_use(&self) -> Option<MemoryUse> {
        self.memory.used()
    }

    fn zeros<T: Plain>(&self, len: usize) -> Result<CudaBuffer<T>> {
        let buffer = self.memory.buffer(len)?;
        self.device.clear(buffer.at(), len * size_of::<T>())?;
        Ok(buffer)
    }

    fn upload<T: Plain>(&self, host: &[T]) -> Result<CudaBuffer<T>> {
        let buffer = self.memory.buffer(host.len())?;
        self.staging
            .write(buffer.at(), bytemuck::cast_slice(host))?;
        Ok(buffer)
    }

    fn upload_pieces<T: Plain, E: From<BackendError>>(
        &self,
        len: usize,
        unit: usize,
        mut fill: impl FnMut(usize, &mut [T]) -> std::result::Result<(), E>,
    ) -> std::result::Result<CudaBuffer<T>, E> {
        let buffer = self.memory.buffer(len)?;
        let piece_len = piece_len::<T>(unit);
        for start in (0..len).step_by(piece_len) {
            let count = piece_len.min(len - start);
            self.staging
                .write_with(buffer.at_index(start), count, |piece| fill(start, piece))?;
        }
        Ok(buffer)
    }

    fn write<T: Plain>(&self, out: &mut CudaBuffer<T>, host: &[T]) -> Result<()> {
        debug_assert!(host.len() <= out.len());
        self.staging.write(out.at(), bytemuck::cast_slice(host))
    }

    fn read<T: Plain>(&self, x: &CudaBuffer<T>, len: usize) -> Result<Vec<T>> {
        debug_assert!(len <= x.len());
        let mut host = vec![T::zeroed(); len];
        self.staging
            .read(bytemuck::cast_slice_mut(&mut host), x.at())?;
        Ok(host)
    }

    fn clear<T: Plain>(&self, out: &mut CudaBuffer<T>, len: usize) -> Result<()> {
        debug_assert!(len <= out.len());
        self.device.clear(out.at(), len * size_of::<T>())
    }

    fn cast<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        x: &CudaBuffer<f32>,
        len: usize,
    ) -> Result<()> {
        elementwise::cast(self, out, x, len)
    }

    fn add(&self, out: &mut CudaBuffer<f32>, x: &CudaBuffer<f32>, len: usize) -> Result<()> {
        elementwise::add(self, out, x, len)
    }

    fn embed(
        &self,
        out: &mut CudaBuffer<f32>,
        table: &CudaBuffer<f16>,
        ids: &CudaBuffer<u32>,
        rows: usize,
        hidden_size: usize,
    ) -> Result<()> {
        rows::embed(self, out, table, ids, rows, hidden_size)
    }

    fn embed_backward(
        &self,
        dtable: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<f16>,
        ids: &CudaBuffer<u32>,
        rows: usize,
        hidden_size: usize,
    ) -> Result<()> {
        rows::embed_backward(self, dtable, dout, ids, rows, hidden_size)
    }

    fn gather_rows(
        &self,
        out: &mut CudaBuffer<f32>,
        x: &CudaBuffer<f32>,
        index: &CudaBuffer<u32>,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        rows::gather_rows(self, out, x, index, first, rows, cols)
    }

    fn scatter_rows(
        &self,
        out: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        index: &CudaBuffer<u32>,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        rows::scatter_rows(self, out, x, index, first, rows, cols)
    }

    fn layer_norm(
        &self,
        out: &mut CudaBuffer<f16>,
        stats: &mut CudaBuffer<f32>,
        x: &CudaBuffer<f32>,
        weight: &CudaBuffer<f16>,
        bias: &CudaBuffer<f16>,
        shape: NormShape,
    ) -> Result<()> {
        norm::layer_norm(self, out, stats, x, weight, bias, shape)
    }

    fn layer_norm_backward(
        &self,
        dx: &mut CudaBuffer<f16>,
        dout: RowGradient<'_, Cuda>,
        x: &CudaBuffer<f32>,
        stats: &CudaBuffer<f32>,
        weight: &CudaBuffer<f16>,
        shape: NormShape,
    ) -> Result<()> {
        norm::layer_norm_backward(self, dx, dout, x, stats, weight, shape)
    }

    fn layer_norm_weight_gradient(
        &self,
        dweight: &mut CudaBuffer<f32>,
        dbias: &mut CudaBuffer<f32>,
        dout: RowGradient<'_, Cuda>,
        x: &CudaBuffer<f32>,
        stats: &CudaBuffer<f32>,
        shape: NormShape,
    ) -> Result<()> {
        norm::layer_norm_weight_gradient(self, dweight, dbias, dout, x, stats, shape)
    }

    fn rms_norm(
        &self,
        out: &mut CudaBuffer<f16>,
        stats: &mut CudaBuffer<f32>,
        x: &CudaBuffer<f32>,
        weight: &CudaBuffer<f16>,
        shape: NormShape,
    ) -> Result<()> {
        norm::rms_norm(self, out, stats, x, weight, shape)
    }

    fn rms_norm_backward(
        &self,
        dx: &mut CudaBuffer<f16>,
        dout: RowGradient<'_, Cuda>,
        x: &CudaBuffer<f32>,
        stats: &CudaBuffer<f32>,
        weight: &CudaBuffer<f16>,
        shape: NormShape,
        accumulate: bool,
    ) -> Result<()> {
        norm::rms_norm_backward(self, dx, dout, x, stats, weight, shape, accumulate)
    }

    fn rms_norm_weight_gradient(
        &self,
        dweight: &mut CudaBuffer<f32>,
        dout: RowGradient<'_, Cuda>,
        x: &CudaBuffer<f32>,
        stats: &CudaBuffer<f32>,
        shape: NormShape,
    ) -> Result<()> {
        norm::rms_norm_weight_gradient(self, dweight, dout, x, stats, shape)
    }

    fn linear<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        x: &CudaBuffer<T>,
        weight: &CudaBuffer<T>,
        bias: Option<&CudaBuffer<T>>,
        shape: LinearShape,
        scale: f32,
        accumulate: bool,
    ) -> Result<()> {
        linear::linear(self, out, x, weight, bias, shape, scale, accumulate)
    }

    fn linear_backward<T: Element>(
        &self,
        dx: &mut CudaBuffer<T>,
        dout: &CudaBuffer<T>,
        weight: &CudaBuffer<T>,
        shape: LinearShape,
        scale: f32,
        accumulate: bool,
    ) -> Result<()> {
        linear::linear_backward(self, dx, dout, weight, shape, scale, accumulate)
    }

    fn weight_gradient<T: Element>(
        &self,
        dweight: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<T>,
        x: &CudaBuffer<T>,
        shape: LinearShape,
        scale: f32,
    ) -> Result<()> {
        linear::weight_gradient(self, dweight, dout, x, shape, scale)
    }

    fn bias_gradient<T: Element>(
        &self,
        dbias: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<T>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::bias_gradient(self, dbias, dout, shape)
    }

    fn rotary(
        &self,
        x: &mut CudaBuffer<f16>,
        cos: &CudaBuffer<f32>,
        sin: &CudaBuffer<f32>,
        position: &CudaBuffer<u32>,
        block_position: &CudaBuffer<u32>,
        layout: &AttentionLayout,
        rows: usize,
        inverse: bool,
    ) -> Result<()> {
        rotary::rotary(
            self,
            x,
            cos,
            sin,
            position,
            block_position,
            layout,
            rows,
            inverse,
        )
    }

    fn store_key_value(
        &self,
        cache: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        slots: &CudaBuffer<u32>,
        layout: &AttentionLayout,
        rows: usize,
    ) -> Result<()> {
        attention::store_key_value(self, cache, x, slots, layout, rows)
    }

    fn attention(
        &self,
        out: &mut CudaBuffer<f16>,
        lse: &mut CudaBuffer<f32>,
        query: &CudaBuffer<f16>,
        key_value: &CudaBuffer<f16>,
        prefix: Option<Prefix<'_, Cuda>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Result<()> {
        attention::attention(
            self, out, lse, query, key_value, prefix, layout, spans, scale,
        )
    }

    fn attention_backward(
        &self,
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
        attention::attention_backward(
            self, dqkv, dprefix, dout, out, lse, qkv, prefix, layout, spans, scale,
        )
    }

    fn prefix_dropout(
        &self,
        out: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        dropout: Dropout,
        sequences: usize,
        prefix_len: usize,
        cols: usize,
    ) -> Result<()> {
        dropout::prefix_dropout(self, out, x, dropout, sequences, prefix_len, cols)
    }

    fn prefix_gradient(
        &self,
        dx: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<f32>,
        dropout: Option<Dropout>,
        sequences: usize,
        prefix_len: usize,
        cols: usize,
    ) -> Result<()> {
        dropout::prefix_gradient(self, dx, dout, dropout, sequences, prefix_len, cols)
    }

    fn dropout(
        &self,
        out: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        dropout: Dropout,
        spans: &[Span],
        cols: usize,
    ) -> Result<()> {
        dropout::dropout(self, out, x, dropout, spans, cols)
    }

    fn dropout_backward(
        &self,
        dx: &mut CudaBuffer<f16>,
        dout: &CudaBuffer<f16>,
        dropout: Dropout,
        spans: &[Span],
        cols: usize,
    ) -> Result<()> {
        dropout::dropout_backward(self, dx, dout, dropout, spans, cols)
    }

    fn gelu(&self, out: &mut CudaBuffer<f16>, x: &CudaBuffer<f16>, len: usize) -> Result<()> {
        elementwise::gelu(self, out, x, len)
    }

    fn gelu_backward(
        &self,
        dx: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        len: usize,
    ) -> Result<()> {
        elementwise::gelu_backward(self, dx, x, len)
    }

    fn swiglu(
        &self,
        out: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        rows: usize,
        inner_hidden_size: usize,
    ) -> Result<()> {
        elementwise::swiglu(self, out, x, rows, inner_hidden_size)
    }

    fn swiglu_backward(
        &self,
        dx: &mut CudaBuffer<f16>,
        dout: &CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        rows: usize,
        inner_hidden_size: usize,
    ) -> Result<()> {
        elementwise::swiglu_backward(self, dx, dout, x, rows, inner_hidden_size)
    }

    fn tanh(&self, x: &mut CudaBuffer<f32>, len: usize) -> Result<()> {
        elementwise::tanh(self, x, len)
    }

    fn tanh_backward(
        &self,
        dx: &mut CudaBuffer<f32>,
        out: &CudaBuffer<f32>,
        len: usize,
    ) -> Result<()> {
        elementwise::tanh_backward(self, dx, out, len)
    }

    fn residual(
        &self,
        out: &mut CudaBuffer<f32>,
        x: &CudaBuffer<f16>,
        alpha: f32,
        branch: &CudaBuffer<f16>,
        len: usize,
    ) -> Result<()> {
        elementwise::residual(self, out, x, alpha, branch, len)
    }

    fn cross_entropy(
        &self,
        loss: &mut CudaBuffer<f32>,
        logits: &mut CudaBuffer<f16>,
        ids: &CudaBuffer<u32>,
        first: usize,
        rows: usize,
        vocab_size: usize,
        scale: f32,
    ) -> Result<()> {
        loss::cross_entropy(self, loss, logits, ids, first, rows, vocab_size, scale)
    }

    fn sum(
        &self,
        out: &mut CudaBuffer<f32>,
        index: usize,
        x: &CudaBuffer<f32>,
        len: usize,
    ) -> Result<()> {
        optim::sum(self, out, index, x, len)
    }

    fn sum_squares(
        &self,
        out: &mut CudaBuffer<f32>,
        terms: &[SumOf<'_, Cuda>],
        scale: f32,
    ) -> Result<()> {
        optim::sum_squares(self, out, terms, scale)
    }

    fn dequantise(
        &self,
        out: &mut CudaBuffer<f16>,
        codes: &CudaBuffer<i8>,
        scales: &CudaBuffer<f16>,
        bits: Bits,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        quant::dequantise(self, out, codes, scales, bits, rows, cols)
    }

    fn adamw(&self, tensors: &mut [AdamwTensor<'_, Cuda>], step: AdamwStep) -> Result<()> {
        optim::adamw(self, tensors, step)
    }
}
