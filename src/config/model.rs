//! The model's `config.json`: what the engine needs of it, checked.

/// Shape and special ids of a ChatGLM-6B model, from `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// V, rows of the embedding and of lm_head.
    pub vocab_size: usize,
    /// H, width of the residual stream.
    pub hidden_size: usize,
    /// F, width inside the MLP (`inner_hidden_size`; 4 H when absent).
    pub inner_hidden_size: usize,
    /// N, attention heads; H / N is head_dim, a multiple of 16 up to 128.
    pub num_attention_heads: usize,
    /// L, number of blocks.
    pub num_layers: usize,
    /// Epsilon of all layer norms.
    pub layernorm_epsilon: f32,
    /// Longest sequence the model is made for.
    pub max_sequence_length: usize,
    /// `bos_token_id`: sop, the first id of an answer.
    pub bos_token_id: u32,
    /// `eos_token_id`: eop, the last id of an answer.
    pub eos_token_id: u32,
    /// `mask_token_id`: [MASK].
    pub mask_token_id: u32,
    /// `gmask_token_id`: [gMASK].
    pub gmask_token_id: u32,
    /// `pad_token_id`, where given.
    pub pad_token_id: Option<u32>,
    /// Whether lm_head shares the embedding matrix (Hugging Face's default: true).
    pub tie_word_embeddings: bool,
    /// `pre_seq_len` of a P-Tuning checkpoint's config, where given.
    pub pre_seq_len: Option<usize>,
    /// `prefix_projection` of a P-Tuning checkpoint's config.
    pub prefix_projection: bool,
}

impl ModelConfig {
    /// Width of one attention head, H / N.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}
