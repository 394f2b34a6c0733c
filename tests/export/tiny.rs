//! Tiny models of every generation with random weights, and what they answer.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use half::{bf16, f16};
use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{
    Dtype, HostTensor, LoraFileConfig, LoraFiles, ModelFolder, TensorSource,
};
use mp_train::config::generate::{GenerateOptions, Prompt};
use mp_train::config::model::ModelConfig;
use mp_train::config::run::{AdapterSection, Device, LoraSection, Quantization};
use mp_train::export::{self, ExportError, ExportOptions, Exported};
use mp_train::generate::{self, Input};
use mp_train::model::trainables::Trainables;
use mp_train::model::weights;
use serde_json::{Value, json};
use tempfile::TempDir;

pub type Tensors = BTreeMap<String, HostTensor>;

/// A generation, by the layout of its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    ChatGlm,
    ChatGlm2,
    Glm,
}

pub const ALL: [Generation; 3] = [Generation::ChatGlm, Generation::ChatGlm2, Generation::Glm];

impl Generation {
    /// Keys in an order that is not the alphabet's.
    pub fn config(self) -> Value {
        match self {
            Generation::ChatGlm => json!({
                "model_type": "chatglm",
                "auto_map": { "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration" },
                "vocab_size": 90,
                "hidden_size": 32,
                "inner_hidden_size": 72,
                "num_attention_heads": 2,
                "num_layers": 3,
                "max_sequence_length": 64,
                "bos_token_id": 84,
                "eos_token_id": 85,
                "mask_token_id": 80,
                "gmask_token_id": 81,
                "pad_token_id": 3,
                "torch_dtype": "float16",
                "tie_word_embeddings": false,
                "position_encoding_2d": true,
            }),
            Generation::ChatGlm2 => json!({
                "model_type": "chatglm",
                "num_layers": 3,
                "padded_vocab_size": 90,
                "hidden_size": 32,
                "ffn_hidden_size": 44,
                "kv_channels": 16,
                "num_attention_heads": 2,
                "multi_query_attention": true,
                "multi_query_group_num": 1,
                "seq_length": 64,
                "layernorm_epsilon": 1e-5,
                "rmsnorm": true,
                "post_layer_norm": true,
                "add_bias_linear": false,
                "add_qkv_bias": true,
                "apply_residual_connection_post_layernorm": false,
                "original_rope": true,
                "torch_dtype": "float16",
                "tie_word_embeddings": false,
                "eos_token_id": 2,
                "pad_token_id": 0,
            }),
            Generation::Glm => json!({
                "model_type": "glm",
                "architectures": ["GlmForCausalLM"],
                "attention_bias": true,
                "vocab_size": 90,
                "hidden_size": 32,
                "intermediate_size": 44,
                "head_dim": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_hidden_layers": 3,
                "max_position_embeddings": 64,
                "partial_rotary_factor": 0.5,
                "rms_norm_eps": 1.5625e-7,
                "rope_theta": 10000.0,
                "hidden_act": "silu",
                "torch_dtype": "bfloat16",
                "tie_word_embeddings": false,
                "eos_token_id": [2, 7],
                "pad_token_id": 2,
            }),
        }
    }

    /// One linear layer of attention and one of the MLP, as `target_modules` asks for them.
    pub fn targets(self) -> [&'static str; 2] {
        match self {
            Generation::ChatGlm | Generation::ChatGlm2 => ["query_key_value", "dense_4h_to_h"],
            Generation::Glm => ["v_proj", "gate_up_proj"],
        }
    }

    /// A prompt that the generation takes.
    fn prompt(self, start: u32) -> Vec<u32> {
        let text = (0..6).map(|i| 10 + (start * 7 + i * 13) % 60);
        match self {
            Generation::ChatGlm => text.chain([81, 84]).collect(),
            Generation::ChatGlm2 | Generation::Glm => text.collect(),
        }
    }
}

/// A fixed-seed generator of numbers from -1 to 1.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn tensor(&mut self, dtype: Dtype, shape: &[usize], size: f32) -> HostTensor {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| size * self.next()).collect();
        stored(dtype, shape, &values)
    }
}

/// Values rounded to an element type.
pub fn stored(dtype: Dtype, shape: &[usize], values: &[f32]) -> HostTensor {
    let values = values.iter();
    let bytes = match dtype {
        Dtype::F16 => values
            .flat_map(|x| f16::from_f32(*x).to_le_bytes())
            .collect(),
        Dtype::Bf16 => values
            .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
            .collect(),
        _ => values.flat_map(|x| x.to_le_bytes()).collect(),
    };
    HostTensor::new(dtype, shape, bytes).unwrap()
}

/// A tiny model in a folder of its own.
pub struct Tiny {
    pub folder: TempDir,
    pub generation: Generation,
    pub model: PathBuf,
    pub config: ModelConfig,
}

impl Tiny {
    /// With weights of this element type.
    pub fn new(generation: Generation, dtype: Dtype) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        fs::create_dir(&model).unwrap();
        let json = generation.config();
        let text = serde_json::to_string_pretty(&json).unwrap();
        fs::write(model.join("config.json"), &text).unwrap();
        let config = ModelConfig::from_json(&text).unwrap();
        let mut random = Random(7);
        let mut tensors = Tensors::new();
        for (name, shape) in weights::model_tensors(&config) {
            let tensor = match name.contains("norm") && name.ends_with("weight") {
                true => stored(dtype, &shape, &vec![1.0; shape[0]]),
                false => random.tensor(dtype, &shape, 0.3),
            };
            tensors.insert(name, tensor);
        }
        write_safetensors(&model.join("model.safetensors"), &tensors).unwrap();
        Tiny {
            folder,
            generation,
            model,
            config,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A LoRA adapter on two kinds of layers, with values that change answers.
    pub fn lora(&self, r: usize, lora_alpha: f32) -> LoraFiles {
        let target_modules = self.generation.targets().map(str::to_owned).to_vec();
        let section = AdapterSection::Lora(LoraSection {
            r,
            lora_alpha,
            lora_dropout: 0.0,
            target_modules: target_modules.clone(),
            init_adapter: None,
        });
        let trainables = Trainables::new(&self.config, &section, false).unwrap();
        let mut random = Random(11);
        let specs = trainables.specs().iter();
        let tensor = specs.map(|spec| {
            let tensor = random.tensor(Dtype::F32, &spec.shape, 0.2);
            (spec.name.clone(), tensor)
        });
        LoraFiles {
            tensors: tensor.collect(),
            config: LoraFileConfig {
                r,
                lora_alpha,
                lora_dropout: 0.0,
                target_modules,
                base_model_name_or_path: None,
                task_type: Some("CAUSAL_LM".to_owned()),
            },
        }
    }

    /// The same in a folder.
    pub fn lora_folder(&self) -> PathBuf {
        let folder = self.path("lora");
        self.lora(4, 8.0).write(&folder).unwrap();
        folder
    }

    pub fn options(&self, adapter: Option<&Path>, output: &str) -> ExportOptions {
        ExportOptions {
            model: self.model.clone(),
            adapter: adapter.map(Path::to_owned),
            output: self.path(output),
            format: None,
            dtype: None,
            quantization: Quantization::None,
            max_shard_size: 5_000_000_000,
        }
    }

    /// Greedy answers to some prompts.
    pub fn answers(&self, model: &Path, adapter: Option<&Path>) -> Vec<Vec<u32>> {
        let prompts: Vec<Vec<u32>> = (0..4).map(|i| self.generation.prompt(i)).collect();
        answers(model, adapter, &prompts)
    }
}

/// Greedy answers to prompts of ids.
pub fn answers(model: &Path, adapter: Option<&Path>, prompts: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let input = |ids: &Vec<u32>| {
        Input::Ids(Prompt {
            line: 1,
            input_ids: ids.clone(),
            context_length: None,
            position_ids: None,
        })
    };
    let inputs: Vec<Input> = prompts.iter().map(input).collect();
    let options = GenerateOptions {
        adapter: adapter.map(Path::to_owned),
        max_new_tokens: 12,
        stop_at_eop: false,
        threads: 1,
        ..GenerateOptions::new(model.to_owned(), vec![Device::Cpu])
    };
    let mut answers = Vec::new();
    let mut emit = |_, answer: &generate::Answer| answers.push(answer.new_tokens.clone());
    let stop = AtomicBool::new(false);
    generate::run(&options, &inputs, &mut emit, &mut |_| {}, &stop).unwrap();
    answers
}

/// Exports, with nobody to stop it.
pub fn export(options: &ExportOptions) -> Result<Exported, ExportError> {
    export::run(options, &AtomicBool::new(false))
}

/// All tensors of a model folder.
pub fn tensors(folder: &Path) -> Tensors {
    let source = ModelFolder::open(folder).unwrap();
    let names = source.names().into_iter();
    names
        .map(|name| {
            let tensor = source.read(&name).unwrap();
            (name, tensor)
        })
        .collect()
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// What the module's adapter adds to its weight, by the definition, in f64.
pub fn delta(files: &LoraFiles, module: &str) -> Option<Vec<f64>> {
    let (_, a, b) = files.pairs().find(|(name, ..)| *name == module)?;
    let (r, cols) = (a.shape[0], a.shape[1]);
    let (a, b) = (a.to_f32().unwrap(), b.to_f32().unwrap());
    let scale = f64::from(files.config.lora_alpha) / r as f64;
    let value = |place: usize| {
        let (row, col) = (place / cols, place % cols);
        let product = |k: usize| f64::from(b[row * r + k]) * f64::from(a[k * cols + col]);
        scale * (0..r).map(product).sum::<f64>()
    };
    Some((0..b.len() / r * cols).map(value).collect())
}
