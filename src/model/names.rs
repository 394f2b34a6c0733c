//! The only table of checkpoint names: what the parts of each generation are called in its files.

use crate::config::architecture::Naming;
use crate::config::model::ModelConfig;

/// What the tensors of a generation are called.
#[derive(Debug)]
pub struct Names {
    /// The embedding, `[V, H]`.
    pub word_embeddings: &'static str,
    /// lm_head, `[V, H]`; may be absent, or equal to the embedding, or shared with it.
    pub lm_head: &'static str,
    /// Final norm, without `.weight` and `.bias`.
    pub final_norm: &'static str,
    /// What the names of the blocks begin with.
    layers: &'static str,
    /// The linear layers of a block in the order of the forward pass: where in the block, and by which
    /// name `target_modules` asks for it.
    linear: &'static [(LinearSite, &'static str, &'static str)],
    /// End of the names of buffers that files carry and nobody reads.
    ignored: &'static str,
    /// What the names of the prefix encoder begin with, where the original has one.
    pub prefix_encoder: Option<&'static str>,
}

const CHATGLM: Names = Names {
    word_embeddings: "transformer.word_embeddings.weight",
    lm_head: "lm_head.weight",
    final_norm: "transformer.final_layernorm",
    layers: "transformer.layers",
    linear: &[
        (LinearSite::QueryKeyValue, "attention", "query_key_value"),
        (LinearSite::Dense, "attention", "dense"),
        (LinearSite::HTo4h, "mlp", "dense_h_to_4h"),
        (LinearSite::FourHToH, "mlp", "dense_4h_to_h"),
    ],
    ignored: ".rotary_emb.inv_freq",
    prefix_encoder: Some("transformer.prefix_encoder"),
};

const CHATGLM2: Names = Names {
    word_embeddings: "transformer.embedding.word_embeddings.weight",
    lm_head: "transformer.output_layer.weight",
    final_norm: "transformer.encoder.final_layernorm",
    layers: "transformer.encoder.layers",
    linear: &[
        (
            LinearSite::QueryKeyValue,
            "self_attention",
            "query_key_value",
        ),
        (LinearSite::Dense, "self_attention", "dense"),
        (LinearSite::HTo4h, "mlp", "dense_h_to_4h"),
        (LinearSite::FourHToH, "mlp", "dense_4h_to_h"),
    ],
    ignored: ".rotary_pos_emb.inv_freq",
    prefix_encoder: Some("transformer.prefix_encoder"),
};

const GLM: Names = Names {
    word_embeddings: "model.embed_tokens.weight",
    lm_head: "lm_head.weight",
    final_norm: "model.norm",
    layers: "model.layers",
    linear: &[
        (LinearSite::Query, "self_attn", "q_proj"),
        (LinearSite::Key, "self_attn", "k_proj"),
        (LinearSite::Value, "self_attn", "v_proj"),
        (LinearSite::Dense, "self_attn", "o_proj"),
        (LinearSite::HTo4h, "mlp", "gate_up_proj"),
        (LinearSite::FourHToH, "mlp", "down_proj"),
    ],
    ignored: ".rotary_emb.inv_freq",
    prefix_encoder: None,
};

impl Names {
    /// The names of a model.
    pub fn of(config: &ModelConfig) -> &'static Names {
        match config.architecture.naming {
            Naming::ChatGlm => &CHATGLM,
            Naming::ChatGlm2 => &CHATGLM2,
            Naming::Glm => &GLM,
        }
    }

    /// The linear layers of a block, in the order of the forward pass.
    pub fn linear_sites(&self) -> impl Iterator<Item = LinearSite> {
        self.linear.iter().map(|(site, ..)| *site)
    }

    /// Whether queries, keys and values come out of layers of their own.
    pub fn splits_qkv(&self) -> bool {
        self.linear_sites().any(|site| site == LinearSite::Query)
    }

    /// The name by which `target_modules` asks for a linear layer.
    pub fn target(&self, site: LinearSite) -> &'static str {
        self.entry(site).1
    }

    /// Name of a linear layer of block `layer`, without `.weight` and `.bias`.
    pub fn linear(&self, site: LinearSite, layer: usize) -> String {
        let (part, target) = self.entry(site);
        format!("{}.{layer}.{part}.{target}", self.layers)
    }

    fn entry(&self, site: LinearSite) -> (&'static str, &'static str) {
        let mut known = self.linear.iter();
        let entry = known.find(|(known, ..)| *known == site);
        // Sites are asked for as `linear_sites` lists them.
        entry.map_or(("", ""), |(_, part, target)| (part, target))
    }

    /// Name of a norm of block `layer`, without `.weight` and `.bias`.
    pub fn norm(&self, site: NormSite, layer: usize) -> String {
        let name = match site {
            NormSite::Input => "input_layernorm",
            NormSite::PostAttention => "post_attention_layernorm",
        };
        format!("{}.{layer}.{name}", self.layers)
    }

    /// Whether it is a buffer that original checkpoints carry and the original ignores on loading.
    pub fn is_ignored(&self, tensor: &str) -> bool {
        tensor.ends_with(self.ignored)
    }
}

/// A linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LinearSite {
    /// Queries, keys and values in one, `[(N + 2 G) D, H]`.
    QueryKeyValue,
    /// Behind attention, `[H, N D]`.
    Dense,
    /// First layer of the MLP, `[F, H]`, or `[2 F, H]` with a gate.
    HTo4h,
    /// Second layer of the MLP, `[H, F]`.
    FourHToH,
    /// Queries alone, `[N D, H]`.
    Query,
    /// Keys alone, `[G D, H]`.
    Key,
    /// Values alone, `[G D, H]`.
    Value,
}

impl LinearSite {
    /// (in_features, out_features).
    pub fn features(self, config: &ModelConfig) -> (usize, usize) {
        let (hidden, inner) = (config.hidden_size, config.inner_hidden_size);
        let (queries, both) = (config.query_width(), config.key_value_width());
        match self {
            LinearSite::QueryKeyValue => (hidden, queries + both),
            LinearSite::Dense => (queries, hidden),
            LinearSite::HTo4h => (hidden, config.mlp_width()),
            LinearSite::FourHToH => (inner, hidden),
            LinearSite::Query => (hidden, queries),
            LinearSite::Key | LinearSite::Value => (hidden, both / 2),
        }
    }

    /// Whether it has a bias.
    pub fn has_bias(self, config: &ModelConfig) -> bool {
        let architecture = &config.architecture;
        match self {
            LinearSite::QueryKeyValue | LinearSite::Query | LinearSite::Key | LinearSite::Value => {
                architecture.qkv_bias
            }
            LinearSite::Dense | LinearSite::HTo4h | LinearSite::FourHToH => {
                architecture.linear_bias
            }
        }
    }

    /// Weights of the linear layers of a block that `wanted` names: the operations of their products
    /// per token are twice as many.
    pub fn weights(config: &ModelConfig, wanted: impl Fn(LinearSite) -> bool) -> f64 {
        let sites = Names::of(config)
            .linear_sites()
            .filter(|site| wanted(*site));
        let weights = sites.map(|site| {
            let (in_features, out_features) = site.features(config);
            in_features as f64 * out_features as f64
        });
        weights.sum()
    }
}

/// A norm of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormSite {
    /// `input_layernorm`.
    Input,
    /// `post_attention_layernorm`.
    PostAttention,
}
