//! The resolved run configuration: every choice made, every default filled in, every value checked.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use super::device::Device;
use super::error::ConfigError;
use super::file::ConfigFile;
use super::layers::Layers;
use super::raw::RawConfig;

/// Everything a training run needs to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    /// The base model.
    pub model: ModelSection,
    /// What is trained.
    pub adapter: AdapterSection,
    /// The training rows.
    pub data: DataSection,
    /// Optimiser, learning rate, loss.
    pub optimizer: OptimizerSection,
    /// Devices, schedule, recomputation.
    pub pipeline: PipelineSection,
    /// Length of the run, output, checkpoints.
    pub run: RunSection,
}

impl RunConfig {
    /// The configuration as TOML: every key, one section after the other. Fails on a path that is not
    /// UTF-8.
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        Ok(toml::to_string(self)?)
    }

    /// Reads and checks a configuration file alone, without flags: the inverse of
    /// [`RunConfig::to_toml`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let file = Some(ConfigFile::read(path)?);
        Layers {
            flags: RawConfig::default(),
            file,
        }
        .resolve()
    }
}

/// `[model]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// Folder with `config.json` and the weights.
    pub path: PathBuf,
    /// Storage type of weights and activations.
    pub precision: Precision,
}

/// Storage type of weights and activations; arithmetic is f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE binary32.
    F32,
    /// IEEE binary16, with dynamic loss scale.
    F16,
}

/// `[adapter]`: what is trained. `kind = "lora" | "prefix" | "full"`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum AdapterSection {
    /// LoRA on linear layers of every block (Hu et al. 2021; names as in PEFT).
    Lora(LoraSection),
    /// P-Tuning v2: trained keys and values in front of every block's own (Liu et al. 2021).
    Prefix(PrefixSection),
    /// Every parameter of the model.
    Full(FullSection),
}

/// LoRA settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoraSection {
    /// Rank.
    pub r: usize,
    /// The product is scaled by `lora_alpha / r`.
    pub lora_alpha: f32,
    /// Dropout on the input of `lora_A`, 0 <= p < 1.
    pub lora_dropout: f32,
    /// Linear layers that gain an adapter, e.g. `["query_key_value"]`.
    pub target_modules: Vec<String>,
    /// PEFT folder to start from; `r`, `lora_alpha` and `target_modules` must agree with it.
    pub init_adapter: Option<PathBuf>,
}

/// P-Tuning v2 settings (names as in THUDM's `config.json`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefixSection {
    /// Number of prefix positions, P.
    pub pre_seq_len: usize,
    /// Whether the prefix comes from a two-layer projection.
    pub prefix_projection: bool,
    /// Dropout on prefix keys and values, separately per sequence, 0 <= p < 1.
    pub prefix_dropout: f32,
    /// Folder to start from (THUDM `pytorch_model.bin` or safetensors).
    pub init_adapter: Option<PathBuf>,
}

/// Whole-model training.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FullSection {}

/// `[data]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSection {
    /// Pre-tokenised JSONL: `input_ids`, `labels`, optional `context_length`, `position_ids`.
    pub train: PathBuf,
    /// Whether rows are shuffled anew in every epoch.
    pub shuffle: bool,
}

/// `[optimizer]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerSection {
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Shape of the learning rate after warm-up.
    pub lr_schedule: LrSchedule,
    /// Optimiser steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Decoupled weight decay; biases and norm weights get none.
    pub weight_decay: f32,
    /// AdamW first-moment decay.
    pub beta1: f32,
    /// AdamW second-moment decay.
    pub beta2: f32,
    /// Added to the square root of the second moment.
    pub eps: f32,
    /// Global gradient norm is clipped to this; 0 switches clipping off.
    pub max_grad_norm: f32,
    /// How micro-batches weigh in the loss of a step.
    pub loss_normalisation: LossNormalisation,
    /// Skipped (non-finite) steps in a row that end the run with exit code 3.
    pub max_skipped_steps: u32,
}

/// Shape of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Stays at the peak.
    Constant,
    /// Falls in a straight line to 0 at the last step.
    Linear,
    /// `(1 + cos(pi x)) / 2`, 0 at the last step.
    Cosine,
}

/// How micro-batches weigh in the loss of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossNormalisation {
    /// Every target token of the step weighs the same.
    PerToken,
    /// Every micro-batch weighs the same, as Hugging Face's Trainer 4.41 does.
    PerMicroBatch,
}

/// `[pipeline]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PipelineSection {
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// Blocks per stage; chosen by cost when absent.
    pub balance: Option<Vec<usize>>,
    /// Order of forwards and backwards.
    pub schedule: ScheduleKind,
    /// What is recomputed in the backward pass.
    pub recompute: Recompute,
    /// CPU threads for all stages together.
    pub threads: usize,
    /// Bytes each CPU stage may use when `recompute = "auto"` chooses; available memory when absent.
    pub memory_per_device: Option<u64>,
}

/// Order of forwards and backwards in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum ScheduleKind {
    /// One forward, one backward (Narayanan et al. 2019).
    #[serde(rename = "1f1b")]
    #[value(name = "1f1b")]
    OneForwardOneBackward,
    /// All forwards, then all backwards (Huang et al. 2018).
    #[serde(rename = "gpipe")]
    Gpipe,
}

/// What the backward pass computes a second time to save memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Recompute {
    /// Nothing: every activation is kept.
    None,
    /// Norms, the first MLP product and GELU; attention is kept.
    AttentionFree,
    /// The whole block from its input.
    Block,
    /// The cheapest of the three that fits.
    Auto,
}

/// `[run]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunSection {
    /// Folder for checkpoints, metrics and the adapter.
    pub output: PathBuf,
    /// Optimiser steps to run.
    pub max_steps: u64,
    /// Sequences per micro-batch.
    pub micro_batch_size: usize,
    /// Micro-batches per step.
    pub gradient_accumulation: usize,
    /// A checkpoint every this many steps; 0: only at the end.
    pub save_steps: u64,
    /// Newest checkpoints to keep; 0: all.
    pub save_total_limit: usize,
    /// Key of all random numbers.
    pub seed: u64,
    /// Continue a run: the newest valid checkpoint of `output`, or a named folder.
    pub resume: Resume,
    /// A progress line every this many steps.
    pub log_steps: u64,
}

/// Where a run starts. Written `"no"`, `"latest"` or the path of a checkpoint folder (one that is
/// called `latest` is written `./latest`).
#[derive(Clone, Debug, PartialEq)]
pub enum Resume {
    /// From the beginning.
    No,
    /// From the newest valid checkpoint in `output`.
    Latest,
    /// From this checkpoint folder.
    From(PathBuf),
}

impl FromStr for Resume {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text {
            "no" => Resume::No,
            "latest" => Resume::Latest,
            path => Resume::From(path.into()),
        })
    }
}

impl Serialize for Resume {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Resume::No => serializer.serialize_str("no"),
            Resume::Latest => serializer.serialize_str("latest"),
            Resume::From(path) => path.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Resume {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Ok(resume) = String::deserialize(deserializer)?.parse();
        Ok(resume)
    }
}
