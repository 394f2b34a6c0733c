//! What stages cost in floating-point operations: by it blocks are dealt out, and steps are predicted.

use crate::config::model::ModelConfig;
use crate::config::run::Recompute;
use crate::model::names::LinearSite;
use crate::model::stage::ChunkShape;

/// What a typical micro-batch consists of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TypicalBatch {
    /// Tokens.
    pub rows: f64,
    /// Pairs of a token and one that it sees.
    pub pairs: f64,
    /// Share of the tokens with a target, 0 to 1.
    pub target_share: f64,
}

impl TypicalBatch {
    /// `sequences` sequences of `tokens` tokens each, `target_share` of them with a target. Tokens in front
    /// of the targets see each other, those behind see what is before them.
    pub fn new(sequences: f64, tokens: f64, target_share: f64) -> Self {
        let context = tokens * (1.0 - target_share);
        let pairs = (tokens * tokens + context * context) / 2.0;
        TypicalBatch {
            rows: sequences * tokens,
            pairs: sequences * pairs,
            target_share,
        }
    }
}

/// Operations of one chunk for one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ChunkCost {
    /// Of its forward pass.
    pub forward: f64,
    /// Of its backward pass, with what is recomputed there.
    pub backward: f64,
}

impl ChunkCost {
    /// Both.
    pub fn total(self) -> f64 {
        self.forward + self.backward
    }
}

/// The cost of one chunk, counting matrix products alone, 2 operations for each multiplication and
/// addition.
///
/// Forward, a block is two for every token and weight of its linear layers (in ChatGLM-6B 4 H^2 + 2 H F
/// of them) and `4 N D` for every visible pair; lm_head is `2 V H` for every token with
/// a target. Backward, the gradients of the inputs are as much again (attention's twice as much), and those
/// of the weights too where they are trained. LoRA and prefixes are little beside it.
pub fn chunk_cost(
    model: &ModelConfig,
    batch: &TypicalBatch,
    chunk: &ChunkShape,
    head: bool,
    recompute: Recompute,
    base_is_trained: bool,
) -> ChunkCost {
    let (v, h) = (model.vocab_size as f64, model.hidden_size as f64);
    let weights = |wanted: &dyn Fn(LinearSite) -> bool| LinearSite::weights(model, wanted);
    let blocks = chunk.blocks.len() as f64;
    let products = 2.0 * weights(&|_| true) * batch.rows;
    let attention = 4.0 * model.query_width() as f64 * batch.pairs;
    let again = match recompute {
        Recompute::None | Recompute::Auto => 0.0,
        Recompute::AttentionFree => 2.0 * weights(&|site| site == LinearSite::HTo4h) * batch.rows,
        Recompute::Block => {
            let last = weights(&|site| site == LinearSite::FourHToH);
            products - 2.0 * last * batch.rows + attention
        }
    };
    let gradients = if base_is_trained { 2.0 } else { 1.0 };
    let lm_head = match head {
        true => 2.0 * v * h * batch.rows * batch.target_share,
        false => 0.0,
    };
    ChunkCost {
        // The head's backward runs inside its forward.
        forward: blocks * (products + attention) + lm_head * (1.0 + gradients),
        backward: blocks * (gradients * products + 2.0 * attention + again),
    }
}
