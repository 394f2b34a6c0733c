//! Models of a named size, for measurements and plans without a model folder.

use serde::Serialize;

use super::architecture::{Architecture, Naming, RotaryKind};
use super::model::{ContextIds, ModelConfig};
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
    /// ChatGLM2-6B and ChatGLM3-6B: 28 blocks of 4,096, vocabulary 65,024.
    #[serde(rename = "chatglm2-6b")]
    #[value(name = "chatglm2-6b")]
    ChatGlm2_6b,
    /// GLM-4-9B in transformers' own form: 40 blocks of 4,096, vocabulary 151,552.
    #[serde(rename = "glm-4-9b")]
    #[value(name = "glm-4-9b")]
    Glm4_9b,
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
            ModelSize::ChatGlm2_6b => "chatglm2-6b",
            ModelSize::Glm4_9b => "glm-4-9b",
            ModelSize::Small => "small",
            ModelSize::Tiny => "tiny",
        }
    }

    /// The configuration, with ids at the end of the vocabulary as in the published models.
    pub fn config(self) -> ModelConfig {
        match self {
            ModelSize::ChatGlm6b => chatglm(130_528, 4_096, 32, 28),
            ModelSize::ChatGlm2_6b => {
                let architecture = Architecture::chatglm2(half_of_head(128));
                grouped(architecture, 65_024, 28, 1e-5, 32_768)
            }
            ModelSize::Glm4_9b => {
                let architecture = Architecture {
                    naming: Naming::Glm,
                    ..Architecture::chatglm2(half_of_head(128))
                };
                grouped(architecture, 151_552, 40, 1.5625e-7, 8_192)
            }
            ModelSize::Small => chatglm(32_768, 1_024, 16, 8),
            ModelSize::Tiny => chatglm(512, 64, 4, 4),
        }
    }
}

fn chatglm(vocab_size: usize, hidden_size: usize, heads: usize, num_layers: usize) -> ModelConfig {
    let id = |from_end: u32| vocab_size as u32 - from_end;
    ModelConfig {
        architecture: Architecture::CHATGLM,
        vocab_size,
        hidden_size,
        inner_hidden_size: 4 * hidden_size,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: hidden_size / heads,
        num_layers,
        norm_epsilon: 1e-5,
        max_sequence_length: 2_048,
        context_ids: Some(ContextIds {
            bos_token_id: id(4),
            mask_token_id: id(7),
            gmask_token_id: id(6),
        }),
        eos_token_ids: vec![id(5)],
        pad_token_id: None,
        tie_word_embeddings: true,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    }
}

fn half_of_head(head_dim: usize) -> RotaryKind {
    RotaryKind::Interleaved {
        width: head_dim / 2,
        base: 10_000.0,
        position_divisor: 1.0,
    }
}

/// The shape that ChatGLM2-6B and GLM-4-9B share: 4,096 wide, 32 heads over 2 of keys and values.
fn grouped(
    architecture: Architecture,
    vocab_size: usize,
    num_layers: usize,
    norm_epsilon: f32,
    max_sequence_length: usize,
) -> ModelConfig {
    ModelConfig {
        architecture,
        vocab_size,
        hidden_size: 4_096,
        inner_hidden_size: 13_696,
        num_attention_heads: 32,
        num_key_value_heads: 2,
        head_dim: 128,
        num_layers,
        norm_epsilon,
        max_sequence_length,
        context_ids: None,
        eos_token_ids: vec![vocab_size as u32 - 1],
        pad_token_id: None,
        tie_word_embeddings: false,
        pre_seq_len: None,
        prefix_projection: false,
        quantization: Quantization::None,
    }
}
