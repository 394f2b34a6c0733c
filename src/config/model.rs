//! The model's `config.json`: what the engine needs of it, checked.

use std::path::Path;

use serde_json::{Map, Value};

use super::error::ConfigError;
use super::file::read_text;
use super::run::Quantization;

/// Longest `config.json` that is read; real ones have some kilobytes.
const MAX_BYTES: u64 = 1 << 20;
/// Upper bounds far beyond any model, so that no product of two of them overflows.
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 12;
const MAX_LAYERS: usize = 1 << 12;
const MAX_SEQUENCE: usize = 1 << 24;

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
    /// `mask_token_id`, the id of `[MASK]`.
    pub mask_token_id: u32,
    /// `gmask_token_id`, the id of `[gMASK]`.
    pub gmask_token_id: u32,
    /// `pad_token_id`, where given.
    pub pad_token_id: Option<u32>,
    /// Whether lm_head shares the embedding matrix (Hugging Face's default: true).
    pub tie_word_embeddings: bool,
    /// `pre_seq_len` of a P-Tuning checkpoint's config, where given.
    pub pre_seq_len: Option<usize>,
    /// `prefix_projection` of a P-Tuning checkpoint's config.
    pub prefix_projection: bool,
    /// How the linear layers of the blocks are held: in the folder, by `quantization_bit`; or, once a
    /// run has opened it, on its devices.
    pub quantization: Quantization,
}

impl ModelConfig {
    /// Reads and checks `config.json` of a first-generation ChatGLM-6B. The error names the key, what
    /// was found, and the generation when it is another one.
    pub fn from_json_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text(path, MAX_BYTES)?;
        Self::from_json(&text).map_err(|message| ConfigError::Model {
            path: path.to_owned(),
            message,
        })
    }

    /// The same for text that is already in memory; the error is the message without the file.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let json: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        refuse_other_models(&json)?;
        let keys = Keys(&json);
        let hidden_size = keys.count("hidden_size", MAX_WIDTH)?;
        let vocab_size = keys.count("vocab_size", MAX_VOCABULARY)?;
        let config = ModelConfig {
            vocab_size,
            hidden_size,
            inner_hidden_size: keys
                .optional("inner_hidden_size", |key| keys.count(key, 4 * MAX_WIDTH))?
                .unwrap_or(4 * hidden_size),
            num_attention_heads: keys.count("num_attention_heads", MAX_HEADS)?,
            num_layers: keys.count("num_layers", MAX_LAYERS)?,
            layernorm_epsilon: keys
                .optional("layernorm_epsilon", |key| keys.epsilon(key))?
                .unwrap_or(1e-5),
            max_sequence_length: keys.count("max_sequence_length", MAX_SEQUENCE)?,
            bos_token_id: keys.token_id("bos_token_id", vocab_size)?,
            eos_token_id: keys.token_id("eos_token_id", vocab_size)?,
            mask_token_id: keys.token_id("mask_token_id", vocab_size)?,
            gmask_token_id: keys.token_id("gmask_token_id", vocab_size)?,
            pad_token_id: keys.optional("pad_token_id", |key| keys.token_id(key, vocab_size))?,
            tie_word_embeddings: keys
                .optional("tie_word_embeddings", |key| keys.flag(key))?
                .unwrap_or(true),
            pre_seq_len: keys.optional("pre_seq_len", |key| keys.count(key, MAX_SEQUENCE))?,
            prefix_projection: keys
                .optional("prefix_projection", |key| keys.flag(key))?
                .unwrap_or(false),
            quantization: keys.quantization()?,
        };
        config.check_together()?;
        Ok(config)
    }

    /// What one key alone cannot tell.
    fn check_together(&self) -> Result<(), String> {
        let (hidden, heads) = (self.hidden_size, self.num_attention_heads);
        if !hidden.is_multiple_of(heads) {
            return Err(format!(
                "hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            ));
        }
        let head_dim = self.head_dim();
        if !head_dim.is_multiple_of(16) || head_dim > 128 {
            return Err(format!(
                "hidden_size {hidden} over num_attention_heads {heads} gives heads of {head_dim}; \
                 this build computes heads of a multiple of 16, up to 128"
            ));
        }
        let ids = [
            ("bos_token_id", self.bos_token_id),
            ("eos_token_id", self.eos_token_id),
            ("mask_token_id", self.mask_token_id),
            ("gmask_token_id", self.gmask_token_id),
        ];
        for (i, (key, id)) in ids.iter().enumerate() {
            if let Some((other, _)) = ids[..i].iter().find(|(_, other)| other == id) {
                return Err(format!("{other} and {key} are both {id}; they must differ"));
            }
        }
        Ok(())
    }

    /// Width of one attention head, H / N.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// Refuses what is no plain ChatGLM-6B of the first generation, saying what it looks like.
fn refuse_other_models(json: &Map<String, Value>) -> Result<(), String> {
    const TRAINS: &str = "this build trains ChatGLM-6B, the first generation (THUDM/chatglm-6b)";
    let looks_like = match json.get("model_type").and_then(Value::as_str) {
        None => {
            return Err(format!(
                "no model_type, so not a Hugging Face model config; {TRAINS}"
            ));
        }
        Some("chatglm") => {
            let later = [
                "padded_vocab_size",
                "multi_query_attention",
                "rmsnorm",
                "ffn_hidden_size",
            ];
            match later.iter().find(|key| json.contains_key(**key)) {
                Some(key) => {
                    format!("`{key}` belongs to ChatGLM2-6B, ChatGLM3-6B or GLM-4-9B")
                }
                None => String::new(),
            }
        }
        Some("glm") => "model_type \"glm\" is GLM-4-9B in transformers' own form".to_owned(),
        Some("glm4") => "model_type \"glm4\" is GLM-4-0414".to_owned(),
        Some(other) => format!("model_type {other:?} is no ChatGLM"),
    };
    if !looks_like.is_empty() {
        return Err(format!("{looks_like}; {TRAINS}"));
    }
    match json.get("position_encoding_2d") {
        None | Some(Value::Bool(true)) => Ok(()),
        Some(found) => Err(format!(
            "position_encoding_2d is {found}; this build computes two-dimensional positions only"
        )),
    }
}

/// Typed access to keys; every error names the key and what was found.
struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
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
                         THUDM/chatglm-6b-int8, THUDM/chatglm-6b-int4 or the full folder \
                         (THUDM/chatglm-6b)"
                    ));
                }
            },
        };
        let key = "quantization_embeddings";
        let embeddings = self.optional(key, |key| self.flag(key))?;
        match quantization != Quantization::None && embeddings == Some(true) {
            true => Err(format!(
                "`{key}` is true; folders with a quantised embedding are not read: use one without \
                 (THUDM/chatglm-6b-int4), or the full folder (THUDM/chatglm-6b) with --quantization"
            )),
            false => Ok(quantization),
        }
    }

    fn token_id(&self, key: &str, vocab_size: usize) -> Result<u32, String> {
        let found = self.get(key)?;
        found
            .as_u64()
            .filter(|id| *id < vocab_size as u64)
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| {
                format!("`{key}` is {found}; it must be an id below vocab_size, {vocab_size}")
            })
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
