//! Every op of the vocabulary, handed to the file that computes it.

use half::f16;

use super::attention::{self, Geometry, Saved};
use super::{
    Cpu, CpuBuffer, dropout, elementwise, loss, matmul, norm, optim, rms_norm, rotary, rows,
    synthetic,
};
use crate::backend::{
    AdamwStep, AdamwTensor, AttentionLayout, Backend, BackendError, Dropout, Element, LinearShape,
    NormShape, Plain, Prefix, RotaryPositions, RowGradient, Span, SumOf, Work,
};
use crate::quant::Bits;
use crate::random::Key;

type Done = Result<(), BackendError>;

impl<E: Element> Backend for Cpu<E> {
    type Element = E;
    type Buffer<T: Plain> = CpuBuffer<T>;

    fn mark(&self, place: u64) -> Done {
        self.pulse.reach(place);
        Ok(())
    }

    fn zeros<T: Plain>(&self, len: usize) -> Result<CpuBuffer<T>, BackendError> {
        CpuBuffer::zeros(len)
    }

    fn upload<T: Plain>(&self, host: &[T]) -> Result<CpuBuffer<T>, BackendError> {
        let mut buffer = CpuBuffer::untouched(host.len())?;
        buffer.copy_from_slice(host);
        Ok(buffer)
    }

    fn upload_pieces<T: Plain, F: From<BackendError> + Send>(
        &self,
        len: usize,
        unit: usize,
        fill: impl Fn(usize, &mut [T]) -> Result<(), F> + Sync,
    ) -> Result<CpuBuffer<T>, F> {
        CpuBuffer::from_pieces(&self.threads, len, unit, fill)
    }

    fn write<T: Plain>(&self, out: &mut CpuBuffer<T>, host: &[T]) -> Done {
        out[..host.len()].copy_from_slice(host);
        Ok(())
    }

    fn read<T: Plain>(&self, x: &CpuBuffer<T>, len: usize) -> Result<Vec<T>, BackendError> {
        Ok(x[..len].to_vec())
    }

    fn clear<T: Plain>(&self, out: &mut CpuBuffer<T>, len: usize) -> Done {
        let _counting = self.threads.clock.count(Work::Elementwise);
        out[..len].fill(T::zeroed());
        Ok(())
    }

    fn cast<T: Element>(&self, out: &mut CpuBuffer<T>, x: &CpuBuffer<f32>, len: usize) -> Done {
        elementwise::cast(&self.threads, &mut out[..len], x);
        Ok(())
    }

    fn add(&self, out: &mut CpuBuffer<f32>, x: &CpuBuffer<f32>, len: usize) -> Done {
        elementwise::add(&self.threads, &mut out[..len], x);
        Ok(())
    }

    fn embed(
        &self,
        out: &mut CpuBuffer<f32>,
        table: &CpuBuffer<E>,
        ids: &CpuBuffer<u32>,
        rows: usize,
        hidden_size: usize,
    ) -> Done {
        rows::embed(&self.threads, out, table, ids, rows, hidden_size);
        Ok(())
    }

    fn embed_backward(
        &self,
        dtable: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<E>,
        ids: &CpuBuffer<u32>,
        rows: usize,
        hidden_size: usize,
    ) -> Done {
        rows::embed_backward(&self.threads, dtable, dout, ids, rows, hidden_size);
        Ok(())
    }

    fn gather_rows(
        &self,
        out: &mut CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        index: &CpuBuffer<u32>,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Done {
        rows::gather(&self.threads, out, x, &index[first..first + rows], cols);
        Ok(())
    }

    fn scatter_rows(
        &self,
        out: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        index: &CpuBuffer<u32>,
        first: usize,
        rows: usize,
        cols: usize,
    ) -> Done {
        let _counting = self.threads.clock.count(Work::Elementwise);
        rows::scatter(out, x, &index[first..first + rows], cols);
        Ok(())
    }

    fn put_columns(
        &self,
        out: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        rows: usize,
        out_cols: usize,
        first: usize,
        cols: usize,
    ) -> Done {
        let out = &mut out[..rows * out_cols];
        rows::put_columns(&self.threads, out, x, out_cols, first, cols);
        Ok(())
    }

    fn take_columns(
        &self,
        out: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        rows: usize,
        x_cols: usize,
        first: usize,
        cols: usize,
    ) -> Done {
        let out = &mut out[..rows * cols];
        rows::take_columns(&self.threads, out, x, x_cols, first, cols);
        Ok(())
    }

    fn layer_norm(
        &self,
        out: &mut CpuBuffer<E>,
        stats: &mut CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        weight: &CpuBuffer<E>,
        bias: &CpuBuffer<E>,
        shape: NormShape,
    ) -> Done {
        norm::layer_norm(&self.threads, out, stats, x, weight, bias, shape);
        Ok(())
    }

    fn layer_norm_backward(
        &self,
        dx: &mut CpuBuffer<E>,
        dout: RowGradient<'_, Self>,
        x: &CpuBuffer<f32>,
        stats: &CpuBuffer<f32>,
        weight: &CpuBuffer<E>,
        shape: NormShape,
    ) -> Done {
        let dout = norm::Gradient::of(dout);
        norm::layer_norm_backward(&self.threads, dx, dout, x, stats, weight, shape);
        Ok(())
    }

    fn layer_norm_weight_gradient(
        &self,
        dweight: &mut CpuBuffer<f32>,
        dbias: &mut CpuBuffer<f32>,
        dout: RowGradient<'_, Self>,
        x: &CpuBuffer<f32>,
        stats: &CpuBuffer<f32>,
        shape: NormShape,
    ) -> Done {
        let dout = norm::Gradient::of(dout);
        norm::layer_norm_weight_gradient(&self.threads, dweight, dbias, dout, x, stats, shape);
        Ok(())
    }

    fn rms_norm(
        &self,
        out: &mut CpuBuffer<E>,
        stats: &mut CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        weight: &CpuBuffer<E>,
        shape: NormShape,
    ) -> Done {
        rms_norm::rms_norm(&self.threads, out, stats, x, weight, shape);
        Ok(())
    }

    fn rms_norm_backward(
        &self,
        dx: &mut CpuBuffer<E>,
        dout: &CpuBuffer<E>,
        residual: Option<&CpuBuffer<E>>,
        x: &CpuBuffer<f32>,
        stats: &CpuBuffer<f32>,
        weight: &CpuBuffer<E>,
        shape: NormShape,
    ) -> Done {
        let residual = residual.map(|residual| &residual[..]);
        rms_norm::backward(&self.threads, dx, dout, residual, x, stats, weight, shape);
        Ok(())
    }

    fn rms_norm_weight_gradient(
        &self,
        dweight: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<E>,
        x: &CpuBuffer<f32>,
        stats: &CpuBuffer<f32>,
        shape: NormShape,
    ) -> Done {
        rms_norm::weight_gradient(&self.threads, dweight, dout, x, stats, shape);
        Ok(())
    }

    fn linear<T: Element>(
        &self,
        out: &mut CpuBuffer<T>,
        x: &CpuBuffer<T>,
        weight: &CpuBuffer<T>,
        bias: Option<&CpuBuffer<T>>,
        shape: LinearShape,
        scale: f32,
        accumulate: bool,
    ) -> Done {
        let bias = bias.map(|bias| &bias[..]);
        let threads = &self.threads;
        matmul::linear(threads, out, x, weight, bias, shape, scale, accumulate);
        Ok(())
    }

    fn linear_backward<T: Element>(
        &self,
        dx: &mut CpuBuffer<T>,
        dout: &CpuBuffer<T>,
        weight: &CpuBuffer<T>,
        shape: LinearShape,
        scale: f32,
        accumulate: bool,
    ) -> Done {
        matmul::linear_backward(&self.threads, dx, dout, weight, shape, scale, accumulate);
        Ok(())
    }

    fn linear_gelu(
        &self,
        out: &mut CpuBuffer<E>,
        pre: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        weight: &CpuBuffer<E>,
        bias: Option<&CpuBuffer<E>>,
        shape: LinearShape,
    ) -> Done {
        let bias = bias.map(|bias| &bias[..]);
        matmul::linear_gelu(&self.threads, out, pre, x, weight, bias, shape);
        Ok(())
    }

    fn gelu_linear_backward(
        &self,
        dpre: &mut CpuBuffer<E>,
        dout: &CpuBuffer<E>,
        weight: &CpuBuffer<E>,
        pre: &CpuBuffer<E>,
        shape: LinearShape,
    ) -> Done {
        matmul::gelu_linear_backward(&self.threads, dpre, dout, weight, pre, shape);
        Ok(())
    }

    fn weight_gradient<T: Element>(
        &self,
        dweight: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<T>,
        x: &CpuBuffer<T>,
        shape: LinearShape,
        scale: f32,
    ) -> Done {
        matmul::weight_gradient(&self.threads, dweight, dout, x, shape, scale);
        Ok(())
    }

    fn bias_gradient<T: Element>(
        &self,
        dbias: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<T>,
        shape: LinearShape,
    ) -> Done {
        norm::column_sums(&self.threads, dbias, dout, shape.rows, shape.out_features);
        Ok(())
    }

    fn rotary(
        &self,
        x: &mut CpuBuffer<E>,
        cos: &CpuBuffer<f32>,
        sin: &CpuBuffer<f32>,
        positions: RotaryPositions<'_, Self>,
        layout: &AttentionLayout,
        rows: usize,
        inverse: bool,
    ) -> Done {
        let table = rotary::Table { cos, sin };
        rotary::rotary(&self.threads, x, table, positions, layout, rows, inverse);
        Ok(())
    }

    fn store_key_value(
        &self,
        cache: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        slots: &CpuBuffer<u32>,
        layout: &AttentionLayout,
        rows: usize,
    ) -> Done {
        let _counting = self.threads.clock.count(Work::Elementwise);
        rows::store_key_value(cache, x, slots, layout, rows);
        Ok(())
    }

    fn attention(
        &self,
        out: &mut CpuBuffer<E>,
        lse: &mut CpuBuffer<f32>,
        query: &CpuBuffer<E>,
        key_value: &CpuBuffer<E>,
        prefix: Option<Prefix<'_, Self>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Done {
        let geometry = Geometry {
            layout,
            spans,
            scale,
        };
        attention::attention(
            &self.threads,
            out,
            lse,
            query,
            key_value,
            prefix.as_ref().map(attention::PrefixRows::of),
            geometry,
        );
        Ok(())
    }

    fn attention_backward(
        &self,
        dqkv: &mut CpuBuffer<E>,
        dprefix: Option<&mut CpuBuffer<f32>>,
        dout: &CpuBuffer<E>,
        out: &CpuBuffer<E>,
        lse: &CpuBuffer<f32>,
        qkv: &CpuBuffer<E>,
        prefix: Option<Prefix<'_, Self>>,
        layout: &AttentionLayout,
        spans: &[Span],
        scale: f32,
    ) -> Done {
        let geometry = Geometry {
            layout,
            spans,
            scale,
        };
        let saved = Saved {
            dout,
            out,
            lse,
            qkv,
        };
        attention::attention_backward(
            &self.threads,
            dqkv,
            dprefix.map(|dprefix| &mut dprefix[..]),
            saved,
            prefix.as_ref().map(attention::PrefixRows::of),
            geometry,
        );
        Ok(())
    }

    fn prefix_dropout(
        &self,
        out: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        dropout: Dropout,
        sequences: usize,
        prefix_len: usize,
        cols: usize,
    ) -> Done {
        let out = &mut out[..sequences * prefix_len * cols];
        dropout::prefix_dropout(&self.threads, out, x, dropout, prefix_len, cols);
        Ok(())
    }

    fn prefix_gradient(
        &self,
        dx: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<f32>,
        dropout: Option<Dropout>,
        sequences: usize,
        prefix_len: usize,
        cols: usize,
    ) -> Done {
        let dx = &mut dx[..prefix_len * cols];
        dropout::prefix_gradient(&self.threads, dx, dout, dropout, sequences, cols);
        Ok(())
    }

    fn dropout(
        &self,
        out: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        dropout: Dropout,
        spans: &[Span],
        cols: usize,
    ) -> Done {
        dropout::dropout(&self.threads, out, x, dropout, spans, cols);
        Ok(())
    }

    fn dropout_backward(
        &self,
        dx: &mut CpuBuffer<E>,
        dout: &CpuBuffer<E>,
        dropout: Dropout,
        spans: &[Span],
        cols: usize,
    ) -> Done {
        dropout::dropout_backward(&self.threads, dx, dout, dropout, spans, cols);
        Ok(())
    }

    fn gelu(&self, out: &mut CpuBuffer<E>, x: &CpuBuffer<E>, len: usize) -> Done {
        elementwise::gelu(&self.threads, &mut out[..len], x);
        Ok(())
    }

    fn gelu_backward(&self, dx: &mut CpuBuffer<E>, x: &CpuBuffer<E>, len: usize) -> Done {
        elementwise::gelu_backward(&self.threads, &mut dx[..len], x);
        Ok(())
    }

    fn swiglu(
        &self,
        out: &mut CpuBuffer<E>,
        x: &CpuBuffer<E>,
        rows: usize,
        inner_hidden_size: usize,
    ) -> Done {
        elementwise::swiglu(
            &self.threads,
            &mut out[..rows * inner_hidden_size],
            x,
            inner_hidden_size,
        );
        Ok(())
    }

    fn swiglu_backward(
        &self,
        dx: &mut CpuBuffer<E>,
        dout: &CpuBuffer<E>,
        x: &CpuBuffer<E>,
        rows: usize,
        inner_hidden_size: usize,
    ) -> Done {
        let dx = &mut dx[..2 * rows * inner_hidden_size];
        elementwise::swiglu_backward(&self.threads, dx, dout, x, inner_hidden_size);
        Ok(())
    }

    fn tanh(&self, x: &mut CpuBuffer<f32>, len: usize) -> Done {
        elementwise::tanh(&self.threads, &mut x[..len]);
        Ok(())
    }

    fn tanh_backward(&self, dx: &mut CpuBuffer<f32>, out: &CpuBuffer<f32>, len: usize) -> Done {
        elementwise::tanh_backward(&self.threads, &mut dx[..len], out);
        Ok(())
    }

    fn residual(
        &self,
        out: &mut CpuBuffer<f32>,
        x: &CpuBuffer<E>,
        alpha: f32,
        branch: &CpuBuffer<E>,
        len: usize,
    ) -> Done {
        elementwise::residual(&self.threads, &mut out[..len], x, alpha, branch);
        Ok(())
    }

    fn residual_sum(
        &self,
        out: &mut CpuBuffer<f32>,
        x: &CpuBuffer<f32>,
        branch: &CpuBuffer<E>,
        len: usize,
    ) -> Done {
        elementwise::residual_sum(&self.threads, &mut out[..len], x, branch);
        Ok(())
    }

    fn cross_entropy(
        &self,
        loss: &mut CpuBuffer<f32>,
        logits: &mut CpuBuffer<E>,
        ids: &CpuBuffer<u32>,
        first: usize,
        rows: usize,
        vocab_size: usize,
        scale: f32,
    ) -> Done {
        loss::cross_entropy(
            &self.threads,
            &mut loss[first..first + rows],
            logits,
            &ids[first..first + rows],
            vocab_size,
            scale,
        );
        Ok(())
    }

    fn sum(&self, out: &mut CpuBuffer<f32>, index: usize, x: &CpuBuffer<f32>, len: usize) -> Done {
        out[index] = optim::sum(&self.threads, &x[..len]);
        Ok(())
    }

    fn dequantise(
        &self,
        out: &mut CpuBuffer<E>,
        codes: &CpuBuffer<i8>,
        scales: &CpuBuffer<f16>,
        bits: Bits,
        rows: usize,
        cols: usize,
    ) -> Done {
        let out = &mut out[..rows * cols];
        rows::dequantise(&self.threads, out, codes, scales, bits, cols);
        Ok(())
    }

    fn synthetic<T: Element>(
        &self,
        out: &mut CpuBuffer<T>,
        len: usize,
        key: Key,
        deviation: f32,
    ) -> Done {
        synthetic::weights(&self.threads, &mut out[..len], key, deviation);
        Ok(())
    }

    fn synthetic_codes(&self, out: &mut CpuBuffer<i8>, len: usize, key: Key, bits: Bits) -> Done {
        synthetic::codes(&self.threads, &mut out[..len], key, bits);
        Ok(())
    }

    fn sum_squares(&self, out: &mut CpuBuffer<f32>, terms: &[SumOf<'_, Self>], scale: f32) -> Done {
        for term in terms {
            let x = &term.x[..term.len];
            out[term.index] = optim::sum_squares(&self.threads, x, scale);
        }
        Ok(())
    }

    fn adamw(&self, tensors: &mut [AdamwTensor<'_, Self>], step: AdamwStep) -> Done {
        for tensor in tensors {
            let weight_decay = tensor.weight_decay;
            let tensor = optim::Tensor::of(tensor);
            optim::adamw(&self.threads, tensor, weight_decay, step);
        }
        Ok(())
    }
}
