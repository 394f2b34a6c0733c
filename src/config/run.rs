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
use super::paths::Paths;
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
    /// Storage of the frozen linear layers of all blocks.
    pub quantization: Quantization,
    /// Rounding of the rotary tables.
    pub rotary_table: RotaryPrecision,
    /// What products of the frozen linear layers are summed in.
    pub product_sums: ProductSums,
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

/// Storage of the frozen linear layers of all blocks, as THUDM's `quantize()` does it: codes with one
/// half scale per output row; embedding, head, norms and biases keep the storage type.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Quantization {
    /// As everything else.
    #[default]
    None,
    /// One byte per weight.
    Int8,
    /// Half a byte per weight.
    Int4,
}

/// What products of halves with the frozen linear layers of all blocks are summed in, on GPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum ProductSums {
    /// IEEE binary32.
    #[default]
    F32,
    /// IEEE binary16, which GeForce cards do at twice the rate.
    F16,
}

/// How the tables of the rotary embedding are rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum RotaryPrecision {
    /// Angles, cosines and sines in f32, as the original computes them when the model runs in f32.
    F32,
    /// The angle rounded to f16 before cosine and sine, and these kept as f16, as the original
    /// computes them when the model runs in half. Far positions drift; trained checkpoints know it.
    Original,
}

impl Precision {
    /// The tables that the original computes at this precision.
    pub fn rotary_table(self) -> RotaryPrecision {
        match self {
            Precision::F32 => RotaryPrecision::F32,
            Precision::F16 => RotaryPrecision::Original,
        }
    }
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
    /// Files, folders or globs: text rows (JSON, JSONL, CSV, plain text, `.gz` of each), or
    /// pre-tokenised JSONL (`input_ids`, `labels`, optional `context_length`, `position_ids`).
    pub train: Paths,
    /// Whether rows are shuffled anew in every epoch.
    pub shuffle: bool,
    /// Rows to measure the loss on every `run.eval_steps`; none where empty.
    pub validation: Paths,
    /// Share of the training rows set aside for that, 0 to below 1.
    pub validation_split: f64,
    /// What a text row becomes.
    pub template: TemplateKind,
    /// Column of the question (alpaca: the instruction); the template's own name when absent.
    pub prompt_column: Option<String>,
    /// Alpaca: column of the input; the template's own name when absent.
    pub input_column: Option<String>,
    /// Column of the answer; the template's own name when absent.
    pub response_column: Option<String>,
    /// Column of earlier turns; the template's own name when absent, none where empty.
    pub history_column: Option<String>,
    /// Whether an empty history is written as `[Round 0]` too, as THUDM's training code does.
    pub round_for_empty_history: bool,
    /// Column of the list of messages; the template's own name when absent.
    pub messages_column: Option<String>,
    /// Key of who speaks in a message; the template's own name when absent.
    pub role_key: Option<String>,
    /// Key of what a message says; the template's own name when absent.
    pub content_key: Option<String>,
    /// ShareGPT: column of the system message; the template's own name when absent, none where empty.
    pub system_column: Option<String>,
    /// Which of the assistant's turns are trained on.
    pub train_on_turns: TrainedTurns,
    /// Text in front of every question.
    pub source_prefix: String,
    /// Most tokens of a question, `[gMASK]` included.
    pub max_source_length: usize,
    /// Most tokens of an answer, sop and eop included.
    pub max_target_length: usize,
    /// Most tokens of a list of messages, or of a row of plain text, special tokens included.
    pub max_length: usize,
    /// Whether text that looks like a special token becomes one.
    pub parse_special: bool,
    /// What happens to a row that cannot be used.
    pub bad_rows: BadRowPolicy,
    /// Whether rows of similar length meet in a micro-batch.
    pub bucket_by_length: bool,
    /// Folder of the tokenised cache; `cache` in the output folder when absent.
    pub cache: Option<PathBuf>,
}

impl DataSection {
    /// Rows of token ids from one file, as a program makes them for itself; every other setting as it
    /// is when nothing is typed.
    pub fn token_ids(train: PathBuf, shuffle: bool) -> Self {
        DataSection {
            train: Paths(vec![train]),
            shuffle,
            validation: Paths::default(),
            validation_split: 0.0,
            template: TemplateKind::Alpaca,
            prompt_column: None,
            input_column: None,
            response_column: None,
            history_column: None,
            round_for_empty_history: false,
            messages_column: None,
            role_key: None,
            content_key: None,
            system_column: None,
            train_on_turns: TrainedTurns::Last,
            source_prefix: String::new(),
            max_source_length: 512,
            max_target_length: 512,
            max_length: 1024,
            parse_special: false,
            bad_rows: BadRowPolicy::Fatal,
            bucket_by_length: false,
            cache: None,
        }
    }
}

/// What a text row becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TemplateKind {
    /// Instruction, input and output.
    Alpaca,
    /// Prompt and response, perhaps after earlier turns (THUDM's form).
    PromptResponse,
    /// Text to be continued.
    PlainText,
    /// Lists of messages with `role` and `content` (OpenAI's form).
    Messages,
    /// Lists of messages with `from` and `value` (ShareGPT's form).
    #[serde(rename = "sharegpt")]
    #[value(name = "sharegpt")]
    ShareGpt,
}

/// Which of the assistant's turns are trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TrainedTurns {
    /// The last one; those before it are context.
    Last,
    /// All of them.
    All,
}

/// What happens to a row that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum BadRowPolicy {
    /// It ends the run before training starts.
    Fatal,
    /// It is left out, counted and shown.
    Skip,
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
    /// Loss scale of the first step where it is dynamic (f16).
    pub initial_loss_scale: f32,
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
    /// Parts of the model that each stage holds, v; 1 unless the schedule is interleaved.
    pub virtual_stages: usize,
    /// What is recomputed in the backward pass.
    pub recompute: Recompute,
    /// CPU threads for all stages together.
    pub threads: usize,
    /// Bytes of each device that the run may use, for all stages on it, context and libraries of a GPU
    /// included; what is free there when absent.
    pub memory_per_device: Option<u64>,
    /// How activations travel between GPUs.
    pub transport: TransportKind,
    /// Seconds in which some stage must load a byte, compile a kernel or finish an action.
    pub stall_timeout: u64,
}

/// Seconds of [`PipelineSection::stall_timeout`] where nothing else is said.
pub const STALL_TIMEOUT: u64 = 120;

/// How activations travel between GPUs. CPU stages exchange them in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum TransportKind {
    /// NCCL between distinct GPUs where its library is found, else peer copies.
    #[default]
    Auto,
    /// NCCL, one rank per GPU.
    Nccl,
    /// Copies from device to device, ordered by events; several stages may share a GPU.
    P2p,
}

/// Order of forwards and backwards in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum ScheduleKind {
    /// One forward, one backward (Narayanan et al. 2019).
    #[serde(rename = "1f1b")]
    #[value(name = "1f1b")]
    OneForwardOneBackward,
    /// 1f1b over several parts of the model per stage (Narayanan et al. 2021).
    #[serde(rename = "interleaved")]
    Interleaved,
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
    /// Optimiser steps to run; `epochs` when absent.
    pub max_steps: Option<u64>,
    /// Times to go through the training rows; `max_steps` when absent. One of the two is set.
    pub epochs: Option<u64>,
    /// Sequences per micro-batch, where `micro_batch_tokens` is absent.
    pub micro_batch_size: usize,
    /// Tokens per micro-batch: as many rows as fit; a longer row stands alone.
    pub micro_batch_tokens: Option<usize>,
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
    /// Loss of the validation rows every this many steps; 0: only at the end.
    pub eval_steps: u64,
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
