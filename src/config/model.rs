//! The model's `config.json`: what the engine needs of it, checked.

use std::path::Path;

use serde_json::{Map, Value};

use super::architecture::{Architecture, Naming, RotaryKind};
use super::error::ConfigError;
use super::file::read_text;
use super::run::Quantization;

mod keys;

use keys::Keys;

/// Longest `config.json` that is read; real ones have some kilobytes.
const MAX_BYTES: u64 = 1 << 20;

/// Ids from which ChatGLM-6B's positions and visible context follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextIds {
    /// `bos_token_id`: sop, the first id of an answer.
    pub bos_token_id: u32,
    /// `mask_token_id`, the id of `[MASK]`.
    pub mask_token_id: u32,
    /// `gmask_token_id`, the id of `[gMASK]`.
    pub gmask_token_id: u32,
}

/// Shape and special ids of a GLM model, from `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// What its generation does in its own way.
    pub architecture: Architecture,
    /// V, rows of the embedding and of lm_head (`padded_vocab_size` in ChatGLM2 and later).
    pub vocab_size: usize,
    /// H, width of the residual stream.
    pub hidden_size: usize,
    /// F, width inside the MLP (`inner_hidden_size`, `ffn_hidden_size`, `intermediate_size`).
    pub inner_hidden_size: usize,
    /// N, attention heads.
    pub num_attention_heads: usize,
    /// G, key and value heads; N is a multiple of it (`multi_query_group_num`, `num_key_value_heads`).
    pub num_key_value_heads: usize,
    /// D, width of a head, a multiple of 16 up to 128 (`kv_channels`).
    pub head_dim: usize,
    /// L, number of blocks.
    pub num_layers: usize,
    /// Epsilon of all norms.
    pub norm_epsilon: f32,
    /// Longest sequence the model is made for (`seq_length`, `max_position_embeddings`).
    pub max_sequence_length: usize,
    /// In ChatGLM-6B, whose tokens have two positions and whose prompts are visible both ways. In later
    /// generations nothing: positions count from 0, and nobody sees what comes after.
    pub context_ids: Option<ContextIds>,
    /// `eos_token_id`, one or several: an answer ends.
    pub eos_token_ids: Vec<u32>,
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
    /// Reads and checks `config.json` of any generation. The error names the key, what was found, and
    /// the model when it is none of them.
    pub fn from_json_file(path: &Path) -> Result<Self, ConfigError> {
        let failed = |message| ConfigError::Model {
            path: path.to_owned(),
            message,
        };
        // Opening a pipe waits for a writer for ever.
        if path.metadata().is_ok_and(|meta| !meta.is_file()) {
            return Err(failed(
                "not a plain file; put the real file there".to_owned(),
            ));
        }
        let text = read_text(path, MAX_BYTES)?;
        Self::from_json(&text).map_err(failed)
    }

    /// The same for text that is already in memory; the error is the message without the file.
    pub fn from_json(text: &str) -> Result<Self, String> {
        if text.starts_with("version https://git-lfs") {
            return Err(
                "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or \
                        download the file again"
                    .to_owned(),
            );
        }
        let json: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| format!("not a JSON object: {error}"))?;
        let keys = Keys(&json);
        let config = match naming(&json)? {
            Naming::ChatGlm => keys.chatglm()?,
            Naming::ChatGlm2 => keys.chatglm2()?,
            Naming::Glm => keys.glm()?,
        };
        config.check_together()?;
        Ok(config)
    }

    /// What one key alone cannot tell.
    fn check_together(&self) -> Result<(), String> {
        let (heads, groups, head_dim) = (
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        );
        if !heads.is_multiple_of(groups) {
            return Err(format!(
                "{heads} attention heads are not a multiple of {groups} key and value heads"
            ));
        }
        if !head_dim.is_multiple_of(16) || head_dim > 128 {
            return Err(format!(
                "heads are {head_dim} wide; this build computes heads of a multiple of 16, up to 128"
            ));
        }
        if let RotaryKind::Interleaved { width, .. } = self.architecture.rotary
            && (width == 0 || !width.is_multiple_of(2) || width > head_dim)
        {
            return Err(format!(
                "the rotary embedding turns {width} of the {head_dim} elements of a head; it must be \
                 an even number of them"
            ));
        }
        let Some(context) = self.context_ids else {
            return Ok(());
        };
        let ids = [
            ("bos_token_id", context.bos_token_id),
            ("eos_token_id", self.eos_token_ids[0]),
            ("mask_token_id", context.mask_token_id),
            ("gmask_token_id", context.gmask_token_id),
        ];
        for (i, (key, id)) in ids.iter().enumerate() {
            if let Some((other, _)) = ids[..i].iter().find(|(_, other)| other == id) {
                return Err(format!("{other} and {key} are both {id}; they must differ"));
            }
        }
        Ok(())
    }

    /// Width of all query heads of a token, N D.
    pub fn query_width(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Width of the keys and values of a token, 2 G D.
    pub fn key_value_width(&self) -> usize {
        2 * self.num_key_value_heads * self.head_dim
    }

    /// Outputs of the MLP's first layer: F, or 2 F where a gate stands beside it.
    pub fn mlp_width(&self) -> usize {
        self.architecture.gates() * self.inner_hidden_size
    }
}

/// By which names a folder's tensors go. Refuses what is no GLM that can be trained, saying what it
/// looks like.
fn naming(json: &Map<String, Value>) -> Result<Naming, String> {
    const TRAINS: &str = "this build trains ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B";
    match json.get("model_type").and_then(Value::as_str) {
        None => Err(format!(
            "no model_type, so not a Hugging Face model config; {TRAINS}"
        )),
        Some("chatglm") => {
            let later = ["padded_vocab_size", "ffn_hidden_size", "kv_channels"];
            match later.iter().any(|key| json.contains_key(*key)) {
                true => Ok(Naming::ChatGlm2),
                false => Ok(Naming::ChatGlm),
            }
        }
        Some("glm") => Ok(Naming::Glm),
        Some("glm4") => Err(format!("model_type \"glm4\" is GLM-4-0414; {TRAINS}")),
        Some(other) => Err(format!("model_type {other:?} is no ChatGLM; {TRAINS}")),
    }
}
