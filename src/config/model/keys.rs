//! `config.json` of each generation, key by key.

use serde_json::{Map, Value};

use super::super::architecture::{Architecture, Naming, NormKind, QkvLayout, RotaryKind};
use super::super::run::Quantization;
use super::{ContextIds, ModelConfig};

/// Upper bounds far beyond any model, so that no product of two of them overflows.
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
const MAX_LAYERS: usize = 1 << 12;
const MAX_SEQUENCE: usize = 1 << 24;
/// Most ids that end an answer.
const MAX_EOS_IDS: usize = 64;
/// Base of the rotary frequencies where nothing else is said.
const ROPE_BASE: f64 = 10_000.0;
/// Name of the model whose `rope_ratio` divides positions; everywhere else it multiplies the base.
const DIVIDES_POSITIONS: &str = "chatglm2-6b-32k";

/// What all generations say alike.
struct Shared {
    pad_token_id: Option<u32>,
    pre_seq_len: Option<usize>,
    prefix_projection: bool,
    quantization: Quantization,
}

/// Typed access to keys; every error names the key and what was found.
pub(super) struct Keys<'a>(pub(super) &'a Map<String, Value>);

impl Keys<'_> {
    /// ChatGLM-6B.
    pub(super) fn chatglm(&self) -> Result<ModelConfig, String> {
        let json = self.0;
        match json.get("position_encoding_2d") {
            None | Some(Value::Bool(true)) => {}
            Some(found) => {
                return Err(format!(
                    "position_encoding_2d is {found}; this build computes two-dimensional positions \
                     only"
                ));
            }
        }
        let hidden_size = self.count("hidden_size", MAX_WIDTH)?;
        let vocab_size = self.count("vocab_size", MAX_VOCABULARY)?;
        let shared = self.shared(vocab_size)?;
        let inner = self.optional("inner_hidden_size", |key| self.count(key, 4 * MAX_WIDTH))?;
        let heads = self.count("num_attention_heads", MAX_HEADS)?;
        Ok(ModelConfig {
            architecture: Architecture::CHATGLM,
            vocab_size,
            hidden_size,
            inner_hidden_size: inner.unwrap_or(4 * hidden_size),
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: self.head_dim_of(hidden_size, heads)?,
            num_layers: self.count("num_layers", MAX_LAYERS)?,
            norm_epsilon: self
                .optional("layernorm_epsilon", |key| self.epsilon(key))?
                .unwrap_or(1e-5),
            max_sequence_length: self.count("max_sequence_length", MAX_SEQUENCE)?,
            context_ids: Some(ContextIds {
                bos_token_id: self.token_id("bos_token_id", vocab_size)?,
                mask_token_id: self.token_id("mask_token_id", vocab_size)?,
                gmask_token_id: self.token_id("gmask_token_id", vocab_size)?,
            }),
            eos_token_ids: vec![self.token_id("eos_token_id", vocab_size)?],
            tie_word_embeddings: self.flag_or("tie_word_embeddings", true)?,
            pad_token_id: shared.pad_token_id,
            pre_seq_len: shared.pre_seq_len,
            prefix_projection: shared.prefix_projection,
            quantization: shared.quantization,
        })
    }

    /// ChatGLM2-6B, ChatGLM3-6B, and GLM-4-9B as first published.
    pub(super) fn chatglm2(&self) -> Result<ModelConfig, String> {
        for (key, wanted) in [
            ("rmsnorm", true),
            ("post_layer_norm", true),
            ("apply_residual_connection_post_layernorm", false),
        ] {
            if self.flag_or(key, wanted)? != wanted {
                return Err(format!(
                    "`{key}` is {}; no published model has that, and this build does not compute it",
                    !wanted
                ));
            }
        }
        let vocab_size = self.count("padded_vocab_size", MAX_VOCABULARY)?;
        let shared = self.shared(vocab_size)?;
        let heads = self.count("num_attention_heads", MAX_HEADS)?;
        let head_dim = self.count("kv_channels", MAX_WIDTH)?;
        let grouped = self.flag_or("multi_query_attention", false)?;
        let rope_ratio = self.positive_or("rope_ratio", 1.0)?;
        let name = self.0.get("_name_or_path").and_then(Value::as_str);
        let divides = name.is_some_and(|name| name.to_lowercase().contains(DIVIDES_POSITIONS));
        let (base_factor, position_divisor) = match divides {
            true => (1.0, rope_ratio),
            false => (rope_ratio, 1.0),
        };
        let rotary = RotaryKind::Interleaved {
            width: head_dim / 2,
            base: ROPE_BASE * base_factor,
            position_divisor,
        };
        let linear_bias = self.flag_or("add_bias_linear", false)?;
        Ok(ModelConfig {
            architecture: Architecture {
                qkv: match grouped {
                    true => QkvLayout::Concatenated,
                    false => QkvLayout::PerHead,
                },
                qkv_bias: linear_bias || self.flag_or("add_qkv_bias", false)?,
                linear_bias,
                ..Architecture::chatglm2(rotary)
            },
            vocab_size,
            hidden_size: self.count("hidden_size", MAX_WIDTH)?,
            inner_hidden_size: self.count("ffn_hidden_size", MAX_WIDTH)?,
            num_attention_heads: heads,
            num_key_value_heads: match grouped {
                true => self.count("multi_query_group_num", MAX_HEADS)?,
                false => heads,
            },
            head_dim,
            num_layers: self.count("num_layers", MAX_LAYERS)?,
            norm_epsilon: self.epsilon("layernorm_epsilon")?,
            max_sequence_length: self.count("seq_length", MAX_SEQUENCE)?,
            context_ids: None,
            eos_token_ids: self.token_ids("eos_token_id", vocab_size)?,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", false)?,
            pad_token_id: shared.pad_token_id,
            pre_seq_len: shared.pre_seq_len,
            prefix_projection: shared.prefix_projection,
            quantization: shared.quantization,
        })
    }

    /// GLM-4-9B in transformers' own form (`GlmForCausalLM`).
    pub(super) fn glm(&self) -> Result<ModelConfig, String> {
        match self.0.get("hidden_act").and_then(Value::as_str) {
            None | Some("silu") => {}
            Some(other) => {
                return Err(format!(
                    "`hidden_act` is {other:?}; GLM-4 has \"silu\", and this build computes no other"
                ));
            }
        }
        let scaling = self.0.get("rope_scaling").filter(|value| !value.is_null());
        if let Some(scaling) = scaling {
            return Err(format!(
                "`rope_scaling` is {scaling}; this build computes plain rotary embeddings only"
            ));
        }
        let vocab_size = self.count("vocab_size", MAX_VOCABULARY)?;
        let shared = self.shared(vocab_size)?;
        let hidden_size = self.count("hidden_size", MAX_WIDTH)?;
        let heads = self.count("num_attention_heads", MAX_HEADS)?;
        let head_dim = match self.optional("head_dim", |key| self.count(key, MAX_WIDTH))? {
            Some(head_dim) => head_dim,
            None => self.head_dim_of(hidden_size, heads)?,
        };
        let share = self.positive_or("partial_rotary_factor", 0.5)?;
        let rotary = RotaryKind::Interleaved {
            width: (head_dim as f64 * share) as usize,
            base: self.positive_or("rope_theta", ROPE_BASE)?,
            position_divisor: 1.0,
        };
        let groups = self.optional("num_key_value_heads", |key| self.count(key, MAX_HEADS))?;
        Ok(ModelConfig {
            architecture: Architecture {
                naming: Naming::Glm,
                norm: NormKind::Rms,
                qkv_bias: self.flag_or("attention_bias", true)?,
                ..Architecture::chatglm2(rotary)
            },
            vocab_size,
            hidden_size,
            inner_hidden_size: self.count("intermediate_size", MAX_WIDTH)?,
            num_attention_heads: heads,
            num_key_value_heads: groups.unwrap_or(heads),
            head_dim,
            num_layers: self.count("num_hidden_layers", MAX_LAYERS)?,
            norm_epsilon: self.epsilon("rms_norm_eps")?,
            max_sequence_length: self.count("max_position_embeddings", MAX_SEQUENCE)?,
            context_ids: None,
            eos_token_ids: self.token_ids("eos_token_id", vocab_size)?,
            tie_word_embeddings: self.flag_or("tie_word_embeddings", false)?,
            pad_token_id: shared.pad_token_id,
            pre_seq_len: shared.pre_seq_len,
            prefix_projection: shared.prefix_projection,
            quantization: shared.quantization,
        })
    }

    /// The keys that all generations have alike.
    fn shared(&self, vocab_size: usize) -> Result<Shared, String> {
        Ok(Shared {
            pad_token_id: self.optional("pad_token_id", |key| self.token_id(key, vocab_size))?,
            pre_seq_len: self.optional("pre_seq_len", |key| self.count(key, MAX_SEQUENCE))?,
            prefix_projection: self.flag_or("prefix_projection", false)?,
            quantization: self.quantization()?,
        })
    }

    fn head_dim_of(&self, hidden: usize, heads: usize) -> Result<usize, String> {
        match hidden.is_multiple_of(heads) {
            true => Ok(hidden / heads),
            false => Err(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            )),
        }
    }

    fn flag_or(&self, key: &str, absent: bool) -> Result<bool, String> {
        let flag = self.optional(key, |key| self.flag(key))?;
        Ok(flag.unwrap_or(absent))
    }

    fn positive_or(&self, key: &str, absent: f64) -> Result<f64, String> {
        let number = self.optional(key, |key| {
            let found = self.get(key)?;
            let number = found
                .as_f64()
                .filter(|number| *number > 0.0 && number.is_finite());
            number.ok_or_else(|| format!("`{key}` is {found}; it must be a number above 0"))
        })?;
        Ok(number.unwrap_or(absent))
    }

    /// One id, or a list of them.
    fn token_ids(&self, key: &str, vocab_size: usize) -> Result<Vec<u32>, String> {
        let found = self.get(key)?;
        let Some(list) = found.as_array() else {
            return Ok(vec![self.token_id(key, vocab_size)?]);
        };
        if list.is_empty() || list.len() > MAX_EOS_IDS {
            return Err(format!(
                "`{key}` lists {} ids; it must have 1 to {MAX_EOS_IDS}",
                list.len()
            ));
        }
        let ids = list.iter().map(|found| id_below(key, found, vocab_size));
        ids.collect()
    }

    fn get(&self, key: &str) -> Result<&Value, String> {
        self.0
            .get(key)
            .filter(|value| !value.is_null())
            .ok_or_else(|| match key {
                "mask_token_id" | "gmask_token_id" => format!(
                    "`{key}` is missing; early ChatGLM-6B folders lack it: add mask_token_id and \
                 gmask_token_id (130000 and 130001 if vocab_size is 130528, 150000 and 150001 if \
                 it is 150528)"
                ),
                _ => format!("`{key}` is missing; is this the model's own file? Download it again"),
            })
    }

    /// `None` when the key is absent or null.
    fn optional<T>(
        &self,
        key: &str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, String> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => read(key).map(Some),
        }
    }

    /// A whole number from 1 to `most`.
    fn count(&self, key: &str, most: usize) -> Result<usize, String> {
        let found = self.get(key)?;
        found
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| (1..=most).contains(n))
            .ok_or_else(|| {
                format!("`{key}` is {found}; it must be a whole number from 1 to {most}")
            })
    }

    fn quantization(&self) -> Result<Quantization, String> {
        let quantization = match self.0.get("quantization_bit") {
            None | Some(Value::Null) => Quantization::None,
            Some(bits) => match bits.as_u64() {
                Some(0) => Quantization::None,
                Some(8) => Quantization::Int8,
                Some(4) => Quantization::Int4,
                _ => {
                    return Err(format!(
                        "`quantization_bit` is {bits}; folders of 8 and of 4 bits are known: use \
                         a folder such as THUDM/chatglm-6b-int4 or the folder of the full model"
                    ));
                }
            },
        };
        let key = "quantization_embeddings";
        let embeddings = self.optional(key, |key| self.flag(key))?;
        match quantization != Quantization::None && embeddings == Some(true) {
            true => Err(format!(
                "`{key}` is true; folders with a quantised embedding are not read: use one without \
                 (THUDM/chatglm-6b-int4), or the folder of the full model with --quantization"
            )),
            false => Ok(quantization),
        }
    }

    fn token_id(&self, key: &str, vocab_size: usize) -> Result<u32, String> {
        id_below(key, self.get(key)?, vocab_size)
    }

    fn flag(&self, key: &str) -> Result<bool, String> {
        let found = self.get(key)?;
        found
            .as_bool()
            .ok_or_else(|| format!("`{key}` is {found}; it must be true or false"))
    }

    fn epsilon(&self, key: &str) -> Result<f32, String> {
        let found = self.get(key)?;
        found
            .as_f64()
            .map(|epsilon| epsilon as f32)
            .filter(|epsilon| *epsilon > 0.0 && *epsilon < 1.0)
            .ok_or_else(|| format!("`{key}` is {found}; it must be above 0 and below 1"))
    }
}

fn id_below(key: &str, found: &Value, vocab_size: usize) -> Result<u32, String> {
    found
        .as_u64()
        .filter(|id| *id < vocab_size as u64)
        .and_then(|id| u32::try_from(id).ok())
        .ok_or_else(|| {
            format!("`{key}` is {found}; it must be an id below vocab_size, {vocab_size}")
        })
}
