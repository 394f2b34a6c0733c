//! Every op of the vocabulary, handed to the family that launches it.

use half::f16;

use super::{
    Cuda, CudaBuffer, Result, attention, dropout, elementwise, linear, loss, norm, optim, quant,
    rotary, rows, synthetic,
};
use crate::backend::{
    AdamwStep, AdamwTensor, AttentionLayout, Backend, BackendError, Dropout, Element, LinearShape,
    MemoryUse, NormShape, Plain, Prefix, RotaryPositions, RowGradient, Span, SumOf, piece_len,
};
use crate::quant::Bits;
use crate::random::Key;

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

    fn upload_pieces<T: Plain, E: From<BackendError> + Send>(
        &self,
        len: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [T]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<CudaBuffer<T>, E> {
        let buffer = self.memory.buffer(len)?;
        let to = |start| buffer.at_index(start);
        self.staging
            .write_pieces(len, piece_len::<T>(unit), to, fill)?;
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

    fn put_columns(
        &self,
        out: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        rows: usize,
        out_cols: usize,
        first: usize,
        cols: usize,
    ) -> Result<()> {
        rows::put_columns(self, out, x, rows, out_cols, first, cols)
    }

    fn take_columns(
        &self,
        out: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        rows: usize,
        x_cols: usize,
        first: usize,
        cols: usize,
    ) -> Result<()> {
        rows::take_columns(self, out, x, rows, x_cols, first, cols)
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
        dout: &CudaBuffer<f16>,
        residual: Option<&CudaBuffer<f16>>,
        x: &CudaBuffer<f32>,
        stats: &CudaBuffer<f32>,
        weight: &CudaBuffer<f16>,
        shape: NormShape,
    ) -> Result<()> {
        norm::rms_norm_backward(self, dx, dout, residual, x, stats, weight, shape)
    }

    fn rms_norm_weight_gradient(
        &self,
        dweight: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<f16>,
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

    fn low_rank_backward(
        &self,
        dlow: &mut CudaBuffer<f16>,
        dweight: &mut CudaBuffer<f32>,
        dout: &CudaBuffer<f16>,
        low: &CudaBuffer<f16>,
        weight: &CudaBuffer<f16>,
        shape: LinearShape,
        scale: f32,
    ) -> Result<()> {
        linear::low_rank_backward(self, dlow, dweight, dout, low, weight, shape, scale)
    }

    fn rotary(
        &self,
        x: &mut CudaBuffer<f16>,
        cos: &CudaBuffer<f32>,
        sin: &CudaBuffer<f32>,
        positions: RotaryPositions<'_, Cuda>,
        layout: &AttentionLayout,
        rows: usize,
        inverse: bool,
    ) -> Result<()> {
        rotary::rotary(self, x, cos, sin, positions, layout, rows, inverse)
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

    fn linear_gelu(
        &self,
        out: &mut CudaBuffer<f16>,
        pre: &mut CudaBuffer<f16>,
        x: &CudaBuffer<f16>,
        weight: &CudaBuffer<f16>,
        bias: Option<&CudaBuffer<f16>>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::linear_gelu(self, out, pre, x, weight, bias, shape)
    }

    fn gelu_linear_backward(
        &self,
        dpre: &mut CudaBuffer<f16>,
        dout: &CudaBuffer<f16>,
        weight: &CudaBuffer<f16>,
        pre: &CudaBuffer<f16>,
        shape: LinearShape,
    ) -> Result<()> {
        linear::gelu_linear_backward(self, dpre, dout, weight, pre, shape)
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

    fn residual_sum(
        &self,
        out: &mut CudaBuffer<f32>,
        x: &CudaBuffer<f32>,
        branch: &CudaBuffer<f16>,
        len: usize,
    ) -> Result<()> {
        elementwise::residual_sum(self, out, x, branch, len)
    }

    fn residual_layer_norm(
        &self,
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
        norm::residual_layer_norm(self, out, stats, sum, x, alpha, branch, weight, bias, shape)
    }

    fn residual_rms_norm(
        &self,
        out: &mut CudaBuffer<f16>,
        stats: &mut CudaBuffer<f32>,
        sum: &mut CudaBuffer<f32>,
        x: &CudaBuffer<f32>,
        branch: &CudaBuffer<f16>,
        weight: &CudaBuffer<f16>,
        shape: NormShape,
    ) -> Result<()> {
        norm::residual_rms_norm(self, out, stats, sum, x, branch, weight, shape)
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

    fn synthetic<T: Element>(
        &self,
        out: &mut CudaBuffer<T>,
        len: usize,
        key: Key,
        deviation: f32,
    ) -> Result<()> {
        synthetic::weights(self, out, len, key, deviation)
    }

    fn synthetic_codes(
        &self,
        out: &mut CudaBuffer<i8>,
        len: usize,
        key: Key,
        bits: Bits,
    ) -> Result<()> {
        synthetic::codes(self, out, len, key, bits)
    }

    fn adamw(&self, tensors: &mut [AdamwTensor<'_, Cuda>], step: AdamwStep) -> Result<()> {
        optim::adamw(self, tensors, step)
    }
}
