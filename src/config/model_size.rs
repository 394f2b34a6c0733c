//! Models of a named size, for measurements and plans without a model folder.

use serde::Serialize;

use super::model::ModelConfig;
use super::run::Quantization;

/// Sizes that can be asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub enum ModelSize {
    /// ChatGLM-6B: 28 blocks of 4,096, vocabulary 130,528.
    #[serde(rename = "chatglm-6b")]
    #[value(name = "chatglm-6b")]
    ChatGlm6b,
    /// 8 blocks of 1,024, vocabulary 32,768: for a CPU.
    Small,
    /// 4 blocks of 64, vocabulary 512: to see that it works.
    Tiny,
}

impl ModelSize {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            ModelSize::ChatGlm6b => "chatglm-6b",
            ModelSize::Small => "small",
            ModelSize::Tiny => "tiny",
        }
    }

    /// The configuration, with ids at the end of the vocabulary as in ChatGLM-6B.
    pub fn config(self) -> ModelConfig {
        let (vocab_size, hidden_size, num_attention_heads, num_layers) = match self {
            ModelSize::ChatGlm6b => (130_528, 4_096, 32, 28),
            ModelSize::Small => (32_768, 1_024, 16, 8),
            ModelSize::Tiny => (512, 64, 4, 4),
        };
        let id = |from_end: u32| vocab_size as u32 - from_end;
        ModelConfig {
            vocab_size,
            hidden_size,
            inner_hidden_size: 4 * hidden_size,
            num_attention_heads,
            num_layers,
            layernorm_epsilon: 1e-5,
            max_sequence_length: 2_048,
            bos_token_id: id(4),
            eos_token_id: id(5),
            mask_token_id: id(7),
            gmask_token_id: id(6),
            pad_token_id: None,
            tie_word_embeddings: true,
            pre_seq_len: None,
            prefix_projection: false,
            quantization: Quantization::None,
        }
    }
}
