//! The attention half of a block: `context = attention(rotary(query_key_value(x)))`.

use super::activations::{AttentionActivations, Scratch};
use super::batch::Batch;
use super::linear::Linear;
use super::qkv::{QkvScratch, QueryKeyValue};
use super::rotary::Rotary;
use crate::adapter::prefix::{PrefixBlock, PrefixShape};
use crate::backend::{AttentionLayout, Backend, BackendError, Dropout, Prefix};
use crate::random::Domain;

/// Query, key and value layers, attention, and the dense layer after it.
pub struct Attention<B: Backend> {
    /// Into one row per token.
    pub query_key_value: QueryKeyValue<B>,
    /// `[H, N D]`.
    pub dense: Linear<B>,
    /// Index of the block in the model.
    pub layer: usize,
    /// How heads lie in a row.
    pub layout: AttentionLayout,
}

/// The trained prefix of one block.
pub struct BlockPrefix<'a, B: Backend> {
    /// Keys and values, and where their gradient goes.
    pub block: &'a mut PrefixBlock<B>,
    /// Sizes.
    pub shape: PrefixShape,
    /// Dropout probability in training; 0 for none.
    pub dropout: f32,
}

impl<B: Backend> BlockPrefix<'_, B> {
    fn noise(&self, batch: &Batch<B>, layer: usize) -> Option<Dropout> {
        let noise = batch.noise.filter(|_| self.dropout > 0.0)?;
        Some(Dropout {
            p: self.dropout,
            key: noise.key(Domain::PrefixDropout).fold(layer as u64),
        })
    }

    /// The prefix as attention sees it in this micro-batch: one for all, or with dropout one each.
    fn rows<'s>(
        &'s self,
        backend: &B,
        room: &'s mut B::Buffer<B::Element>,
        batch: &Batch<B>,
        layer: usize,
    ) -> Result<Prefix<'s, B>, BackendError> {
        let shape = self.shape;
        let shared = self.block.key_value();
        let noise = self.noise(batch, layer);
        let key_value = match noise {
            Some(dropout) => {
                let sequences = batch.spans.len();
                backend.prefix_dropout(room, shared, dropout, sequences, shape.len, shape.width)?;
                &*room
            }
            None => shared,
        };
        Ok(Prefix {
            key_value,
            len: shape.len,
            per_sequence: noise.is_some(),
        })
    }
}

impl<B: Backend> Attention<B> {
    /// 1 / sqrt(D). ChatGLM's code divides queries by sqrt(D) * (layer + 1) and multiplies the scores
    /// back in f32, which keeps half-precision scores in range; scores here are never rounded.
    fn scale(&self) -> f32 {
        1.0 / (self.layout.head_dim as f32).sqrt()
    }

    /// Fills `qkv`, `lse` and `context` from the norm's output, `x [T, H]`. With a cache, keys and
    /// values are appended to it and attended to there.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        backend: &B,
        acts: &mut AttentionActivations<B>,
        x: &B::Buffer<B::Element>,
        batch: &Batch<B>,
        rotary: &Rotary<B>,
        prefix: Option<&BlockPrefix<'_, B>>,
        cache: Option<&mut B::Buffer<B::Element>>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        let Scratch {
            prefix: room,
            part,
            linear,
            ..
        } = scratch;
        let qkv = &mut acts.qkv;
        let layers = QkvScratch { part, linear };
        self.query_key_value
            .forward(backend, qkv, x, batch, layers)?;
        self.rotate(backend, qkv, batch, rotary, false)?;
        let layer = self.layer;
        let prefix = match prefix {
            Some(prefix) => Some(prefix.rows(backend, room, batch, layer)?),
            None => None,
        };
        let (out, lse, spans) = (&mut acts.context, &mut acts.lse, &batch.spans);
        let (layout, scale) = (&self.layout, self.scale());
        match cache {
            Some(cache) => {
                backend.store_key_value(cache, qkv, &batch.cache_rows, layout, batch.rows)?;
                let layout = layout.with_cache();
                backend.attention(out, lse, qkv, cache, prefix, &layout, spans, scale)
            }
            None => backend.attention(out, lse, qkv, qkv, prefix, layout, spans, scale),
        }
    }

    /// From `dcontext` to `dqkv` (both in the scratch) and the gradient of the prefix.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(
        &self,
        backend: &B,
        acts: &AttentionActivations<B>,
        batch: &Batch<B>,
        rotary: &Rotary<B>,
        prefix: Option<BlockPrefix<'_, B>>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        let Scratch {
            dcontext,
            dqkv,
            prefix: room,
            dprefix,
            ..
        } = scratch;
        let layer = self.layer;
        let prefix_rows = match &prefix {
            Some(prefix) => Some(prefix.rows(backend, room, batch, layer)?),
            None => None,
        };
        backend.attention_backward(
            dqkv,
            prefix_rows.is_some().then_some(&mut *dprefix),
            dcontext,
            &acts.context,
            &acts.lse,
            &acts.qkv,
            prefix_rows,
            &self.layout,
            &batch.spans,
            self.scale(),
        )?;
        if let Some(prefix) = prefix {
            let (noise, shape) = (prefix.noise(batch, layer), prefix.shape);
            let (sequences, dx) = (batch.spans.len(), prefix.block.accumulate());
            backend.prefix_gradient(dx, dprefix, noise, sequences, shape.len, shape.width)?;
        }
        self.rotate(backend, dqkv, batch, rotary, true)
    }

    fn rotate(
        &self,
        backend: &B,
        qkv: &mut B::Buffer<B::Element>,
        batch: &Batch<B>,
        rotary: &Rotary<B>,
        inverse: bool,
    ) -> Result<(), BackendError> {
        backend.rotary(
            qkv,
            &rotary.cos,
            &rotary.sin,
            rotary.positions(batch),
            &self.layout,
            batch.rows,
            inverse,
        )
    }
}
