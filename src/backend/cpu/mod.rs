//! The CPU backend: the readable reference, and what a person without a GPU runs.

mod attention;
mod dropout;
mod elementwise;
mod loss;
mod matmul;
mod norm;
mod optim;
mod reduce;
mod rotary;
mod rows;
mod threads;

use std::marker::PhantomData;

use self::attention::{Geometry, PrefixRows, Saved};
use self::matmul::{Extent, Matrix};
use self::threads::Threads;
use super::{
    AdamwStep, AdamwTensor, AttentionLayout, Backend, BackendError, Dropout, Element, LinearShape,
    NormShape, Plain, Prefix, RowGradient, Span, SumOf,
};

/// The CPU, storing weights and activations as `E`, computing in f32.
pub struct Cpu<E> {
    threads: Threads,
    element: PhantomData<E>,
}

/// Host memory.
pub struct CpuBuffer<T>(Vec<T>);

impl<E: Element> Cpu<E> {
    /// A CPU backend with its own `threads` compute threads.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(threads: usize) -> Result<Self, BackendError> {
        Ok(Cpu {
            threads: Threads::new(threads)?,
            element: PhantomData,
        })
    }
}

fn rows_of<'a, E: Element>(prefix: &Prefix<'a, Cpu<E>>) -> PrefixRows<'a, E> {
    PrefixRows {
        key_value: &prefix.key_value.0,
        len: prefix.len,
        per_sequence: prefix.per_sequence,
    }
}

fn gradient_of<'a, E: Element>(dout: RowGradient<'a, Cpu<E>>) -> norm::Gradient<'a, E> {
    norm::Gradient {
        dout: &dout.dout.0,
        residual: dout.residual.map(|(values, alpha)| (&values.0[..], alpha)),
    }
}

type Done = Result<(), BackendError>;

impl<E: Element> Backend for Cpu<E> {
    type Element = E;
    type Buffer<T: Plain> = CpuBuffer<T>;

    fn zeros<T: Plain>(&self, len: usize) -> Result<CpuBuffer<T>, BackendError> {
        let mut values = Vec::new();
        values
            .try_reserve_exact(len)
            .map_err(|_| BackendError::OutOfMemory {
                device: "cpu".to_owned(),
                bytes: len.saturating_mul(std::mem::size_of::<T>()),
            })?;
        values.resize(len, T::zeroed());
        Ok(CpuBuffer(values))
    }

    fn upload<T: Plain>(&self, host: &[T]) -> Result<CpuBuffer<T>, BackendError> {
        let mut buffer = self.zeros(host.len())?;
        buffer.0.copy_from_slice(host);
        Ok(buffer)
    }

    fn write<T: Plain>(&self, out: &mut CpuBuffer<T>, host: &[T]) -> Done {
        out.0[..host.len()].copy_from_slice(host);
        Ok(())
    }

    fn read<T: Plain>(&self, x: &CpuBuffer<T>, len: usize) -> Result<Vec<T>, BackendError> {
        Ok(x.0[..len].to_vec())
    }

    fn clear<T: Plain>(&self, out: &mut CpuBuffer<T>, len: usize) -> Done {
        out.0[..len].fill(T::zeroed());
        Ok(())
    }

    fn cast<T: Element>(&self, out: &mut CpuBuffer<T>, x: &CpuBuffer<f32>, len: usize) -> Done {
        elementwise::cast(&self.threads, &mut out.0[..len], &x.0);
        Ok(())
    }

    fn add(&self, out: &mut CpuBuffer<f32>, x: &CpuBuffer<f32>, len: usize) -> Done {
        elementwise::add(&self.threads, &mut out.0[..len], &x.0);
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
        rows::embed(
            &self.threads,
            &mut out.0,
            &table.0,
            &ids.0,
            rows,
            hidden_size,
        );
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
        rows::embed_backward(
            &self.threads,
            &mut dtable.0,
            &dout.0,
            &ids.0,
            rows,
            hidden_size,
        );
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
        rows::gather(
            &self.threads,
            &mut out.0,
            &x.0,
            &index.0[first..first + rows],
            cols,
        );
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
        rows::scatter(&mut out.0, &x.0, &index.0[first..first + rows], cols);
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
        let threads = &self.threads;
        norm::layer_norm(
            threads,
            &mut out.0,
            &mut stats.0,
            &x.0,
            &weight.0,
            &bias.0,
            shape,
        );
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
        let dout = gradient_of(dout);
        norm::layer_norm_backward(
            &self.threads,
            &mut dx.0,
            dout,
            &x.0,
            &stats.0,
            &weight.0,
            shape,
        );
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
        let dout = gradient_of(dout);
        norm::layer_norm_weight_gradient(
            &self.threads,
            &mut dweight.0,
            &mut dbias.0,
            dout,
            &x.0,
            &stats.0,
            shape,
        );
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
        let extent = Extent {
            m: shape.rows,
            n: shape.out_features,
            k: shape.in_features,
        };
        matmul::product(
            &self.threads,
            &mut out.0,
            extent,
            Matrix::rows(&x.0, shape.in_features),
            Matrix::transposed(&weight.0, shape.in_features),
            bias.map(|bias| &bias.0[..]),
            scale,
            accumulate,
        );
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
        let extent = Extent {
            m: shape.rows,
            n: shape.in_features,
            k: shape.out_features,
        };
        matmul::product(
            &self.threads,
            &mut dx.0,
            extent,
            Matrix::rows(&dout.0, shape.out_features),
            Matrix::rows(&weight.0, shape.in_features),
            None,
            scale,
            accumulate,
        );
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
        let extent = Extent {
            m: shape.out_features,
            n: shape.in_features,
            k: shape.rows,
        };
        matmul::product(
            &self.threads,
            &mut dweight.0,
            extent,
            Matrix::transposed(&dout.0, shape.out_features),
            Matrix::rows(&x.0, shape.in_features),
            None,
            scale,
            true,
        );
        Ok(())
    }

    fn bias_gradient<T: Element>(
        &self,
        dbias: &mut CpuBuffer<f32>,
        dout: &CpuBuffer<T>,
        shape: LinearShape,
    ) -> Done {
        norm::column_sums(
            &self.threads,
            &mut dbias.0,
            &dout.0,
            shape.rows,
            shape.out_features,
        );
        Ok(())
    }

    fn rotary(
        &self,
        x: &mut CpuBuffer<E>,
        cos: &CpuBuffer<f32>,
        sin: &CpuBuffer<f32>,
        position: &CpuBuffer<u32>,
        block_position: &CpuBuffer<u32>,
        layout: &AttentionLayout,
        rows: usize,
        inverse: bool,
    ) -> Done {
        let table = rotary::Table {
            cos: &cos.0,
            sin: &sin.0,
        };
        let positions = [&position.0[..], &block_position.0[..]];
        rotary::rotary(
            &self.threads,
            &mut x.0,
            table,
            positions,
            layout,
            rows,
            inverse,
        );
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
        rows::store_key_value(&mut cache.0, &x.0, &slots.0, layout, rows);
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
            &mut out.0,
            &mut lse.0,
            &query.0,
            &key_value.0,
            prefix.as_ref().map(rows_of),
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
            dout: &dout.0,
            out: &out.0,
            lse: &lse.0,
            qkv: &qkv.0,
        };
        attention::attention_backward(
            &self.threads,
            &mut dqkv.0,
            dprefix.map(|dprefix| &mut dprefix.0[..]),
            saved,
            prefix.as_ref().map(rows_of),
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
        let out = &mut out.0[..sequences * prefix_len * cols];
        dropout::prefix_dropout(&self.threads, out, &x.0, dropout, prefix_len, cols);
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
        let dx = &mut dx.0[..prefix_len * cols];
        dropout::prefix_gradient(&self.threads, dx, &dout.0, dropout, sequences, cols);
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
        dropout::dropout(&self.threads, &mut out.0, &x.0, dropout, spans, cols);
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
        dropout::dropout_backward(&self.threads, &mut dx.0, &dout.0, dropout, spans, cols);
        Ok(())
    }

    fn gelu(&self, out: &mut CpuBuffer<E>, x: &CpuBuffer<E>, len: usize) -> Done {
        elementwise::gelu(&self.threads, &mut out.0[..len], &x.0);
        Ok(())
    }

    fn gelu_backward(&self, dx: &mut CpuBuffer<E>, x: &CpuBuffer<E>, len: usize) -> Done {
        elementwise::gelu_backward(&self.threads, &mut dx.0[..len], &x.0);
        Ok(())
    }

    fn tanh(&self, x: &mut CpuBuffer<f32>, len: usize) -> Done {
        elementwise::tanh(&self.threads, &mut x.0[..len]);
        Ok(())
    }

    fn tanh_backward(&self, dx: &mut CpuBuffer<f32>, out: &CpuBuffer<f32>, len: usize) -> Done {
        elementwise::tanh_backward(&self.threads, &mut dx.0[..len], &out.0);
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
        elementwise::residual(&self.threads, &mut out.0[..len], &x.0, alpha, &branch.0);
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
            &mut loss.0[first..first + rows],
            &mut logits.0,
            &ids.0[first..first + rows],
            vocab_size,
            scale,
        );
        Ok(())
    }

    fn sum(&self, out: &mut CpuBuffer<f32>, index: usize, x: &CpuBuffer<f32>, len: usize) -> Done {
        out.0[index] = optim::sum(&self.threads, &x.0[..len]);
        Ok(())
    }

    fn sum_squares(&self, out: &mut CpuBuffer<f32>, terms: &[SumOf<'_, Self>], scale: f32) -> Done {
        for term in terms {
            let x = &term.x.0[..term.len];
            out.0[term.index] = optim::sum_squares(&self.threads, x, scale);
        }
        Ok(())
    }

    fn adamw(&self, tensors: &mut [AdamwTensor<'_, Self>], step: AdamwStep) -> Done {
        for tensor in tensors {
            let len = tensor.len;
            let slices = optim::Tensor {
                working: &mut tensor.working.0[..len],
                master: &mut tensor.master.0[..len],
                exp_avg: &mut tensor.exp_avg.0[..len],
                exp_avg_sq: &mut tensor.exp_avg_sq.0[..len],
                gradient: &tensor.gradient.0[..len],
            };
            optim::adamw(&self.threads, slices, tensor.weight_decay, step);
        }
        Ok(())
    }
}
