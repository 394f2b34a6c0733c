//! A tiny GLM with random weights, written as a Hugging Face folder.

use std::path::Path;

use serde_json::json;

use super::DemoError;
use crate::checkpoint::HostTensor;
use crate::checkpoint::run_state::write_json;
use crate::checkpoint::safetensors::write_safetensors;
use crate::config::model::ModelConfig;
use crate::data::tokenizer::GlmTokenizer;
use crate::model::weights::model_tensors;
use crate::random::{Domain, Key};

/// H: wide enough for 200 answers, and a step takes some hundredths of a second.
const HIDDEN_SIZE: usize = 128;
const HEADS: usize = 4;
const BLOCKS: usize = 4;
/// Standard deviation of the random weights.
const DEVIATION: f32 = 0.02;

/// Writes `config.json`, with the ids of `tokenizer`, and `model.safetensors`, with the values of
/// `seed`.
///
/// # Errors
/// The files cannot be written.
pub fn write(folder: &Path, tokenizer: &GlmTokenizer, seed: u64) -> Result<(), DemoError> {
    let special = tokenizer.special();
    let config = json!({
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "hidden_size": HIDDEN_SIZE,
        "inner_hidden_size": 4 * HIDDEN_SIZE,
        "num_attention_heads": HEADS,
        "num_layers": BLOCKS,
        "layernorm_epsilon": 1e-5,
        "max_sequence_length": 256,
        "position_encoding_2d": true,
        "tie_word_embeddings": false,
        "torch_dtype": "float32",
        "vocab_size": tokenizer.size(),
        "mask_token_id": special.mask,
        "gmask_token_id": special.gmask,
        "bos_token_id": special.sop,
        "eos_token_id": special.eop,
        "pad_token_id": special.pad,
    });
    let path = folder.join("config.json");
    write_json(&path, &config)?;
    let config = ModelConfig::from_json_file(&path)?;
    let mut tensors = Vec::new();
    for (index, (name, shape)) in (0..).zip(model_tensors(&config)) {
        let mut stream = Key::new(seed, Domain::ModelInit).fold(index).stream();
        let count = shape.iter().product();
        let values: Vec<f32> = match (shape.len(), name.ends_with(".bias")) {
            (_, true) => vec![0.0; count],
            // The weight of a norm.
            (1, false) => vec![1.0; count],
            _ => (0..count).map(|_| DEVIATION * stream.normal()).collect(),
        };
        tensors.push((name, HostTensor::from_f32(shape, &values)?));
    }
    let tensors = tensors.iter().map(|(name, tensor)| (name, tensor));
    Ok(write_safetensors(
        &folder.join("model.safetensors"),
        tensors,
    )?)
}
