//! One GLM block: `a = norm1(x); y = alpha a + attention(a); b = norm2(y); out = alpha b + mlp(b)`.
//! The residual is the *normed* input.

use super::activations::{AttentionActivations, DenseActivations, Scratch};
use super::attention::{Attention, BlockPrefix};
use super::batch::Batch;
use super::mlp::Mlp;
use super::norm::Norm;
use super::qkv::QkvScratch;
use super::rotary::Rotary;
use crate::adapter::Parameter;
use crate::adapter::lora::Lora;
use crate::backend::{Backend, BackendError};

/// A place in the block, in the order of the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Depth {
    Norm1,
    QueryKeyValue,
    Prefix,
    Dense,
    Norm2,
    HTo4h,
    FourHToH,
}

/// One GLM block.
pub struct Block<B: Backend> {
    /// `input_layernorm`.
    pub norm1: Norm<B>,
    /// `attention`.
    pub attention: Attention<B>,
    /// `post_attention_layernorm`.
    pub norm2: Norm<B>,
    /// `mlp`.
    pub mlp: Mlp<B>,
}

/// What all blocks of a stage share in one action.
pub struct Shared<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// Rotary tables.
    pub rotary: &'a Rotary<B>,
    /// The micro-batch.
    pub batch: &'a Batch<B>,
}

/// The block behind a block, on the same stage.
pub struct Next<'a, B: Backend> {
    /// Its first norm.
    pub norm1: &'a Norm<B>,
    /// Where that norm's output and statistics go; nothing where both blocks use one room.
    pub dense: Option<&'a mut DenseActivations<B>>,
}

impl<B: Backend> Block<B> {
    /// `x [T, H]` to `out [T, H]`, f32 sums both; fills `attention` and `dense`. The first norm is taken
    /// here for the first block of a stage, and for every other by the block before it, its `next`.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn forward(
        &self,
        shared: &Shared<'_, B>,
        out: &mut B::Buffer<f32>,
        x: &B::Buffer<f32>,
        attention: &mut AttentionActivations<B>,
        dense: &mut DenseActivations<B>,
        prefix: Option<&BlockPrefix<'_, B>>,
        cache: Option<&mut B::Buffer<B::Element>>,
        (is_first, next): (bool, Option<Next<'_, B>>),
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        if is_first {
            self.norm1(shared, dense, x)?;
        }
        self.attend(shared, x, attention, dense, prefix, cache, scratch)?;
        let Shared { backend, batch, .. } = *shared;
        let Scratch { branch, linear, .. } = scratch;
        self.mlp.widen(backend, dense, batch, linear)?;
        let narrow = &self.mlp.dense_4h_to_h;
        narrow.forward(backend, branch, &dense.activated, batch, linear)?;
        let (sum, rows) = (&attention.sum, batch.rows);
        let Some(next) = next else {
            let normed = &dense.norm2;
            return self.norm2.residual(backend, out, sum, normed, branch, rows);
        };
        let DenseActivations {
            norm1,
            norm1_stats,
            norm2: normed,
            ..
        } = dense;
        let normed_next = match next.dense {
            Some(dense) => (&mut dense.norm1, &mut dense.norm1_stats),
            None => (norm1, norm1_stats),
        };
        self.norm2.residual_and_norm(
            backend,
            next.norm1,
            normed_next,
            out,
            sum,
            normed,
            branch,
            rows,
        )
    }

    /// Fills `dense` again from the block's input and what attention left (`attention_free`).
    ///
    /// # Errors
    /// When the device fails.
    pub fn recompute_dense(
        &self,
        shared: &Shared<'_, B>,
        x: &B::Buffer<f32>,
        attention: &AttentionActivations<B>,
        dense: &mut DenseActivations<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        self.norm1(shared, dense, x)?;
        let Shared { backend, batch, .. } = *shared;
        let (out, stats) = (&mut dense.norm2, &mut dense.norm2_stats);
        self.norm2
            .forward(backend, out, stats, &attention.sum, batch.rows)?;
        self.mlp.widen(backend, dense, batch, &mut scratch.linear)
    }

    /// Fills `attention` and `dense` again from the block's input (`block`).
    ///
    /// # Errors
    /// When the device fails.
    pub fn recompute_all(
        &self,
        shared: &Shared<'_, B>,
        x: &B::Buffer<f32>,
        attention: &mut AttentionActivations<B>,
        dense: &mut DenseActivations<B>,
        prefix: Option<&BlockPrefix<'_, B>>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        self.norm1(shared, dense, x)?;
        self.attend(shared, x, attention, dense, prefix, None, scratch)?;
        let Shared { backend, batch, .. } = *shared;
        self.mlp.widen(backend, dense, batch, &mut scratch.linear)
    }

    fn norm1(
        &self,
        shared: &Shared<'_, B>,
        dense: &mut DenseActivations<B>,
        x: &B::Buffer<f32>,
    ) -> Result<(), BackendError> {
        let DenseActivations {
            norm1, norm1_stats, ..
        } = dense;
        self.norm1
            .forward(shared.backend, norm1, norm1_stats, x, shared.batch.rows)
    }

    /// Attention, its residual sum and the norm of that.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        shared: &Shared<'_, B>,
        x: &B::Buffer<f32>,
        attention: &mut AttentionActivations<B>,
        dense: &mut DenseActivations<B>,
        prefix: Option<&BlockPrefix<'_, B>>,
        cache: Option<&mut B::Buffer<B::Element>>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        let Shared {
            backend,
            rotary,
            batch,
        } = *shared;
        let DenseActivations {
            norm1: normed,
            norm2,
            norm2_stats,
            ..
        } = dense;
        self.attention.forward(
            backend, attention, normed, batch, rotary, prefix, cache, scratch,
        )?;
        let Scratch { branch, linear, .. } = scratch;
        let layer = &self.attention.dense;
        layer.forward(backend, branch, &attention.context, batch, linear)?;
        self.norm1.residual_and_norm(
            backend,
            &self.norm2,
            (norm2, norm2_stats),
            &mut attention.sum,
            x,
            normed,
            branch,
            batch.rows,
        )
    }

    /// The lowest place of the block with something to train; `None` when there is nothing.
    fn lowest_trained(&self, prefix: bool) -> Option<Depth> {
        let places = [
            (Depth::Norm1, self.norm1.is_trained()),
            (
                Depth::QueryKeyValue,
                self.attention.query_key_value.is_trained(),
            ),
            (Depth::Prefix, prefix),
            (Depth::Dense, self.attention.dense.is_trained()),
            (Depth::Norm2, self.norm2.is_trained()),
            (Depth::HTo4h, self.mlp.dense_h_to_4h.is_trained()),
            (Depth::FourHToH, self.mlp.dense_4h_to_h.is_trained()),
        ];
        let trained = places.into_iter().find(|(_, trained)| *trained);
        trained.map(|(depth, _)| depth)
    }

    /// The mirror of [`Block::forward`]: gradients of what is trained, and `dx` where something below
    /// the block is trained. Without it, the walk ends at the lowest place that is trained.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn backward(
        &mut self,
        shared: &Shared<'_, B>,
        dx: Option<&mut B::Buffer<B::Element>>,
        dout: &B::Buffer<B::Element>,
        x: &B::Buffer<f32>,
        attention: &AttentionActivations<B>,
        dense: &DenseActivations<B>,
        prefix: Option<BlockPrefix<'_, B>>,
        scratch: &mut Scratch<B>,
    ) -> Result<(), BackendError> {
        let Shared {
            backend,
            rotary,
            batch,
        } = *shared;
        let lowest = self.lowest_trained(prefix.is_some());
        // Whether anything lies below a place that needs its input gradient.
        let wanted = |depth: Depth| dx.is_some() || lowest.is_some_and(|lowest| lowest < depth);

        let below = wanted(Depth::FourHToH);
        let Scratch {
            dactivated,
            dinner,
            branch,
            linear,
            ..
        } = &mut *scratch;
        let rooms = [dinner, dactivated];
        let dinner = self
            .mlp
            .narrow_backward(backend, rooms, below, dout, dense, batch, linear)?;
        if !below {
            return Ok(());
        }

        let below = wanted(Depth::HTo4h);
        let dnorm2 = below.then_some(branch);
        let widen = &mut self.mlp.dense_h_to_4h;
        widen.backward(backend, dnorm2, dinner, &dense.norm2, batch, linear, false)?;
        if !below {
            return Ok(());
        }

        let below = wanted(Depth::Norm2);
        let dnorm2 = &scratch.branch;
        let dsum = below.then_some(&mut scratch.dsum);
        let (sum, stats) = (&attention.sum, &dense.norm2_stats);
        self.norm2
            .backward(backend, dsum, dnorm2, Some(dout), sum, stats, batch.rows)?;
        if !below {
            return Ok(());
        }

        let below = wanted(Depth::Dense);
        let dcontext = below.then_some(&mut scratch.dcontext);
        let (dsum, linear) = (&scratch.dsum, &mut scratch.linear);
        let layer = &mut self.attention.dense;
        let context = &attention.context;
        layer.backward(backend, dcontext, dsum, context, batch, linear, false)?;
        if !below {
            return Ok(());
        }

        let below = wanted(Depth::Prefix);
        self.attention
            .backward(backend, attention, batch, rotary, prefix, scratch)?;
        if !below {
            return Ok(());
        }

        let below = wanted(Depth::QueryKeyValue);
        let Scratch {
            branch,
            dqkv,
            part,
            linear,
            ..
        } = &mut *scratch;
        let dnorm1 = below.then_some(branch);
        let layers = &mut self.attention.query_key_value;
        let room = QkvScratch { part, linear };
        layers.backward(backend, dnorm1, dqkv, &dense.norm1, batch, room)?;
        if !below {
            return Ok(());
        }

        let (dnorm1, dsum) = (&scratch.branch, &scratch.dsum);
        let stats = &dense.norm1_stats;
        self.norm1
            .backward(backend, dx, dnorm1, Some(dsum), x, stats, batch.rows)
    }

    /// The LoRAs of this block.
    pub fn loras_mut(&mut self) -> impl Iterator<Item = &mut Lora<B>> {
        let behind = [
            &mut self.attention.dense,
            &mut self.mlp.dense_h_to_4h,
            &mut self.mlp.dense_4h_to_h,
        ];
        let layers = self.attention.query_key_value.layers_mut().iter_mut();
        let layers = layers.chain(behind);
        layers.filter_map(|layer| layer.lora.as_mut())
    }

    /// What is trained in this block, prefix apart.
    pub fn parameters(&mut self) -> Vec<&mut Parameter<B>> {
        let mut all: Vec<&mut Parameter<B>> = Vec::new();
        all.extend(self.norm1.parameters());
        all.extend(self.attention.query_key_value.parameters());
        all.extend(self.attention.dense.parameters());
        all.extend(self.norm2.parameters());
        all.extend(self.mlp.dense_h_to_4h.parameters());
        all.extend(self.mlp.dense_4h_to_h.parameters());
        all
    }
}
