//! The matrix products that a step needs, counted: the numerator of MFU.

use serde::Serialize;

use super::rows::RowCounts;
use crate::config::model::ModelConfig;
use crate::config::run::AdapterSection;
use crate::model::names::{LinearSite, Names};
use crate::model::trainables::{Trainables, lora_name};

/// Floating-point operations of the products of a step, 2 for each multiplication and addition. What
/// is needed is counted, not what was done: no recomputation, no padding, lm_head on rows with a
/// target, attention over visible pairs, and no gradient of an input below which nothing is trained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Flops {
    /// The base's linear layers.
    pub linear: f64,
    /// lm_head.
    pub head: f64,
    /// Queries with keys, weights with values.
    pub attention: f64,
    /// LoRA's two matrices.
    pub adapter: f64,
    /// All of them.
    pub total: f64,
}

impl Flops {
    /// Of a step over rows that amount to `counts`.
    pub fn needed(config: &ModelConfig, trainables: &Trainables, counts: &RowCounts) -> Self {
        let mut flops = Flops::default();
        for layer in 0..config.num_layers {
            flops.add_block(config, trainables, counts, layer);
        }
        // Forward and the gradient of its input; the gradient of its weight where it is trained.
        let products = if trainables.is_full() { 3.0 } else { 2.0 };
        let matrix = config.vocab_size as f64 * config.hidden_size as f64;
        flops.head = products * 2.0 * matrix * counts.targets as f64;
        flops.total = flops.linear + flops.head + flops.attention + flops.adapter;
        flops
    }

    fn add_block(
        &mut self,
        config: &ModelConfig,
        trainables: &Trainables,
        counts: &RowCounts,
        layer: usize,
    ) {
        let names = Names::of(config);
        let rank = |site| {
            let name = lora_name(names, site, layer, "lora_A");
            let found = trainables.find(&name, None);
            found.map(|(_, spec)| spec.shape[0] as f64)
        };
        let (full, rows) = (trainables.is_full(), counts.tokens as f64);
        // Whether something is trained below what a layer reads: only then is the gradient of its
        // input wanted.
        let below = full || layer > 0;
        let mut fed = below;
        let mut has_attended = false;
        for site in names.linear_sites() {
            let is_attention_input = matches!(
                site,
                LinearSite::QueryKeyValue | LinearSite::Query | LinearSite::Key | LinearSite::Value
            );
            if !is_attention_input && !has_attended {
                // Attention lies between the layers that feed it and the one behind it.
                fed |= self.add_attention(config, trainables, counts, fed);
                has_attended = true;
            }
            // Queries, keys and values read the same input.
            let wants_input = if is_attention_input { below } else { fed };
            let (columns, width) = site.features(config);
            let (columns, width) = (columns as f64, width as f64);
            let passes = 1.0 + f64::from(wants_input) + f64::from(full);
            self.linear += passes * 2.0 * columns * width * rows;
            if let Some(rank) = rank(site) {
                // x A and its product with B; gradients of B and of x A; gradient of A, and that of x.
                let passes = 2.0 + f64::from(wants_input);
                self.adapter += 2.0 * rank * rows * (3.0 * width + passes * columns);
                fed = true;
            }
        }
    }

    /// Adds attention's products; true where its prefix is trained. `fed`: whether gradients of the
    /// queries, keys and values of tokens are wanted.
    fn add_attention(
        &mut self,
        config: &ModelConfig,
        trainables: &Trainables,
        counts: &RowCounts,
        fed: bool,
    ) -> bool {
        let prefix = match &trainables.adapter {
            Some(AdapterSection::Prefix(prefix)) => prefix.pre_seq_len,
            _ => 0,
        };
        let product = |pairs: f64| 2.0 * config.query_width() as f64 * pairs;
        let pairs = counts.visible_pairs as f64;
        let prefix_pairs = prefix as f64 * counts.tokens as f64;
        // Forward: scores, and their weights with the values.
        self.attention += 2.0 * product(pairs + prefix_pairs);
        // Backward: gradients of weights, values, keys, and queries.
        if fed {
            self.attention += 4.0 * product(pairs + prefix_pairs);
        } else {
            // Those of the prefix alone: of weights, values and keys.
            self.attention += 3.0 * product(prefix_pairs);
        }
        prefix > 0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::bench::rows::micro_batches;
    use crate::config::model_size::ModelSize;
    use crate::config::run::{FullSection, LoraSection, PrefixSection};
    use crate::data::batch::MicroBatch;

    /// Counts by doing: every product as the loop that would compute it.
    #[derive(Default)]
    struct Counter {
        operations: u64,
    }

    impl Counter {
        /// `[rows, inner] x [inner, columns]`.
        fn product(&mut self, rows: usize, inner: usize, columns: usize) {
            for _row in 0..rows {
                for _column in 0..columns {
                    for _ in 0..inner {
                        self.operations += 2;
                    }
                }
            }
        }

        /// One of attention's products, over the pairs that the mask lets through.
        fn pairs(&mut self, batch: &MicroBatch, width: usize) {
            for sequence in &batch.sequences {
                for query in 0..sequence.len {
                    for key in 0..sequence.len {
                        if key <= query || key < sequence.context_length {
                            self.product(1, width, 1);
                        }
                    }
                }
            }
        }
    }

    /// A model with layers of all kinds of shapes, small enough to count.
    fn small(size: ModelSize) -> ModelConfig {
        let mut config = size.config();
        let groups = if size == ModelSize::Tiny { 4 } else { 2 };
        config.vocab_size = 23;
        config.hidden_size = 12;
        config.inner_hidden_size = 17;
        config.num_attention_heads = 4;
        config.num_key_value_heads = groups;
        config.head_dim = 3;
        config.num_layers = 3;
        config
    }

    fn lora(rank: usize, target: &str) -> AdapterSection {
        AdapterSection::Lora(LoraSection {
            r: rank,
            lora_alpha: 1.0,
            lora_dropout: 0.0,
            target_modules: vec![target.to_owned()],
            init_adapter: None,
        })
    }

    fn prefix(pre_seq_len: usize) -> AdapterSection {
        AdapterSection::Prefix(PrefixSection {
            pre_seq_len,
            prefix_projection: false,
            prefix_dropout: 0.0,
            init_adapter: None,
        })
    }

    fn counted(config: &ModelConfig, adapter: &AdapterSection, batches: &[MicroBatch]) -> f64 {
        let tied = config.tie_word_embeddings;
        let trainables = Trainables::new(config, adapter, tied).unwrap();
        Flops::needed(config, &trainables, &RowCounts::of(batches)).total
    }

    /// The linear layers of a ChatGLM block by hand: (columns, width).
    fn chatglm_layers() -> [(usize, usize); 4] {
        [(12, 36), (12, 12), (12, 17), (17, 12)]
    }

    #[test]
    fn lora_beside_queries_keys_and_values_is_counted_as_it_is_computed() {
        let config = small(ModelSize::Tiny);
        let batches = micro_batches(&[5, 9, 4], 2, &config, 0);
        let mut counter = Counter::default();
        for batch in &batches {
            let (t, r) = (batch.tokens(), 2);
            for layer in 0..3 {
                for (site, (columns, width)) in chatglm_layers().into_iter().enumerate() {
                    counter.product(t, columns, width);
                    // Nothing is trained below the first layer of the first block.
                    if (layer, site) != (0, 0) {
                        counter.product(t, width, columns);
                    }
                }
                counter.product(t, 12, r);
                counter.product(t, r, 36);
                counter.product(36, t, r);
                counter.product(t, 36, r);
                counter.product(r, t, 12);
                if layer > 0 {
                    counter.product(t, r, 12);
                }
                for _ in 0..6 {
                    counter.pairs(batch, 12);
                }
            }
            counter.product(batch.targets.len(), 12, 23);
            counter.product(batch.targets.len(), 23, 12);
        }
        let flops = counted(&config, &lora(2, "query_key_value"), &batches);
        assert_eq!(flops, counter.operations as f64);
    }

    #[test]
    fn lora_behind_attention_needs_no_gradient_of_it_in_the_first_block() {
        let config = small(ModelSize::Tiny);
        let batches = micro_batches(&[7, 4], 2, &config, 0);
        let mut counter = Counter::default();
        let batch = &batches[0];
        let t = batch.tokens();
        for layer in 0..3 {
            for (site, (columns, width)) in chatglm_layers().into_iter().enumerate() {
                counter.product(t, columns, width);
                if layer > 0 || site > 1 {
                    counter.product(t, width, columns);
                }
            }
            // Beside `dense`.
            for (rows, inner, columns) in
                [(t, 12, 3), (t, 3, 12), (12, t, 3), (t, 12, 3), (3, t, 12)]
            {
                counter.product(rows, inner, columns);
            }
            if layer > 0 {
                counter.product(t, 3, 12);
            }
            for _ in 0..if layer > 0 { 6 } else { 2 } {
                counter.pairs(batch, 12);
            }
        }
        counter.product(batch.targets.len(), 12, 23);
        counter.product(batch.targets.len(), 23, 12);
        let flops = counted(&config, &lora(3, "dense"), &batches);
        assert_eq!(flops, counter.operations as f64);
    }

    #[test]
    fn a_prefix_is_counted_as_it_is_computed() {
        let config = small(ModelSize::ChatGlm2_6b);
        let batches = micro_batches(&[6, 5, 4], 3, &config, 0);
        let mut counter = Counter::default();
        let (batch, p) = (&batches[0], 7);
        let t = batch.tokens();
        // Two key and value heads; the MLP has a gate.
        let layers = [(12, 24), (12, 12), (12, 34), (17, 12)];
        for layer in 0..3 {
            for (site, (columns, width)) in layers.into_iter().enumerate() {
                counter.product(t, columns, width);
                if layer > 0 || site > 0 {
                    counter.product(t, width, columns);
                }
            }
            for _ in 0..if layer > 0 { 6 } else { 2 } {
                counter.pairs(batch, 12);
            }
            for _ in 0..if layer > 0 { 6 } else { 5 } {
                counter.product(t, 12, p);
            }
        }
        counter.product(batch.targets.len(), 12, 23);
        counter.product(batch.targets.len(), 23, 12);
        let flops = counted(&config, &prefix(p), &batches);
        assert_eq!(flops, counter.operations as f64);
    }

    #[test]
    fn a_whole_model_is_counted_as_it_is_computed() {
        let config = small(ModelSize::Glm4_9b);
        let batches = micro_batches(&[5, 4], 1, &config, 0);
        let mut counter = Counter::default();
        // Queries, keys, values, dense, gate and up, down.
        let layers = [(12, 12), (12, 6), (12, 6), (12, 12), (12, 34), (17, 12)];
        for batch in &batches {
            let t = batch.tokens();
            for _layer in 0..3 {
                for (columns, width) in layers {
                    counter.product(t, columns, width);
                    counter.product(t, width, columns);
                    counter.product(width, t, columns);
                }
                for _ in 0..6 {
                    counter.pairs(batch, 12);
                }
            }
            let targets = batch.targets.len();
            counter.product(targets, 12, 23);
            counter.product(targets, 23, 12);
            counter.product(23, targets, 12);
        }
        let full = AdapterSection::Full(FullSection::default());
        let flops = counted(&config, &full, &batches);
        assert_eq!(flops, counter.operations as f64);
    }
}
