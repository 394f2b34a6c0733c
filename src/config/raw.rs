//! What was typed: every key optional, nothing checked but its type.
//!
//! One struct is both a TOML section and a group of flags, so a key cannot exist without its flag.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "help texts show defaults in brackets"
)]

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::byte_size::ByteSize;
use super::paths::Paths;
use super::run::{
    BadRowPolicy, Device, LossNormalisation, LrSchedule, Precision, ProductSums, Quantization,
    Recompute, Resume, RotaryPrecision, ScheduleKind, TemplateKind, TrainedTurns, TransportKind,
};

/// A run configuration as typed, in a file or as flags.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[expect(
    missing_docs,
    reason = "the sections are documented where they are defined"
)]
pub struct RawConfig {
    #[command(flatten)]
    pub model: RawModel,
    #[command(flatten)]
    pub adapter: RawAdapter,
    #[command(flatten)]
    pub data: RawData,
    #[command(flatten)]
    pub optimizer: RawOptimizer,
    #[command(flatten)]
    pub pipeline: RawPipeline,
    #[command(flatten)]
    pub run: RawRun,
}

/// `[model]`: the base model.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Model")]
pub struct RawModel {
    /// Model folder: config.json and weights
    #[arg(long = "model", value_name = "DIR")]
    pub path: Option<PathBuf>,
    /// Storage of weights and activations [f32 on cpu]
    #[arg(long, value_name = "f32|f16", hide_possible_values = true)]
    pub precision: Option<Precision>,
    /// Storage of the frozen linear layers: none, int8 or int4 [none]
    #[arg(long, value_name = "WHAT", hide_possible_values = true)]
    pub quantization: Option<Quantization>,
    /// Rounding of the rotary tables: original as the model's own f16 code [original with f16]
    #[arg(long, value_name = "original|f32", hide_possible_values = true)]
    pub rotary_table: Option<RotaryPrecision>,
    /// Sums in the frozen layers' products [f32]
    #[arg(long, value_name = "f32|f16", hide_possible_values = true)]
    pub product_sums: Option<ProductSums>,
}

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum AdapterKind {
    /// Low-rank matrices beside linear layers.
    Lora,
    /// P-Tuning v2.
    Prefix,
    /// Every parameter.
    Full,
}

/// `[adapter]`: what is trained. Which keys are legal depends on `kind`.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Adapter")]
pub struct RawAdapter {
    /// What is trained [lora]
    #[arg(long, value_name = "lora|prefix|full", hide_possible_values = true)]
    pub kind: Option<AdapterKind>,
    /// LoRA: rank [8]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub r: Option<usize>,
    /// LoRA: scale times r [32]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub lora_alpha: Option<f32>,
    /// LoRA: dropout on its input [0]
    #[arg(long, value_name = "P", value_parser = number::<f32>)]
    pub lora_dropout: Option<f32>,
    /// LoRA: linear layers, or all-linear [query_key_value]
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub target_modules: Option<Vec<String>>,
    /// Prefix: positions [128]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub pre_seq_len: Option<usize>,
    /// Prefix: two-layer projection [false]
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    pub prefix_projection: Option<bool>,
    /// Prefix: dropout on keys and values [0.1]
    #[arg(long, value_name = "P", value_parser = number::<f32>)]
    pub prefix_dropout: Option<f32>,
    /// LoRA, prefix: adapter folder to start from, with its settings
    #[arg(long, value_name = "DIR")]
    pub init_adapter: Option<PathBuf>,
}

/// `[data]`: the training rows.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Data")]
pub struct RawData {
    /// Training rows: files, folders, globs
    #[arg(long, value_name = "PATH,..")]
    pub train: Option<Paths>,
    /// New order in every epoch [true]
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    pub shuffle: Option<bool>,
    /// Rows for the validation loss [none]
    #[arg(long, value_name = "PATH,..")]
    pub validation: Option<Paths>,
    /// Share of the rows set aside for it [0]
    #[arg(long, value_name = "X", value_parser = number::<f64>)]
    pub validation_split: Option<f64>,
    /// Form of rows, such as messages or sharegpt [alpaca]
    #[arg(long, value_name = "KIND", hide_possible_values = true)]
    pub template: Option<TemplateKind>,
    /// Question or instruction [by template]
    #[arg(long, value_name = "NAME")]
    pub prompt_column: Option<String>,
    /// Alpaca's input [input]
    #[arg(long, value_name = "NAME")]
    pub input_column: Option<String>,
    /// Answer [by template]
    #[arg(long, value_name = "NAME")]
    pub response_column: Option<String>,
    /// Earlier turns [history]
    #[arg(long, value_name = "NAME")]
    pub history_column: Option<String>,
    /// [Round 0] before a first question [false]
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    pub round_for_empty_history: Option<bool>,
    /// List of messages [by template]
    #[arg(long, value_name = "NAME")]
    pub messages_column: Option<String>,
    /// Who speaks in a message [role, from]
    #[arg(long, value_name = "NAME")]
    pub role_key: Option<String>,
    /// What a message says [content, value]
    #[arg(long, value_name = "NAME")]
    pub content_key: Option<String>,
    /// ShareGPT's system message [system]
    #[arg(long, value_name = "NAME")]
    pub system_column: Option<String>,
    /// Loss on the last turn or on all [messages: all]
    #[arg(long, value_name = "last|all", hide_possible_values = true)]
    pub train_on_turns: Option<TrainedTurns>,
    /// Text before every question [none]
    #[arg(long, value_name = "TEXT")]
    pub source_prefix: Option<String>,
    /// Most tokens of a question [512]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_source_length: Option<usize>,
    /// Most tokens of an answer [512]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_target_length: Option<usize>,
    /// Most tokens of messages or plain text [their sum]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_length: Option<usize>,
    /// Text like `<sop>` becomes special [false]
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    pub parse_special: Option<bool>,
    /// An unusable row: fatal or skip [fatal]
    #[arg(long, value_name = "fatal|skip", hide_possible_values = true)]
    pub bad_rows: Option<BadRowPolicy>,
    /// Like lengths in one micro-batch [false]
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    pub bucket_by_length: Option<bool>,
    /// Tokenised rows [cache in the output]
    #[arg(long, value_name = "DIR")]
    pub cache: Option<PathBuf>,
}

/// `[optimizer]`: AdamW, learning rate, loss.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Optimizer")]
pub struct RawOptimizer {
    /// Peak [lora 1e-4, prefix 2e-2, full 1e-5]
    #[arg(long, visible_alias = "lr", value_name = "X", value_parser = number::<f64>)]
    pub learning_rate: Option<f64>,
    /// After warm-up [linear]
    #[arg(
        long,
        value_name = "constant|linear|cosine",
        hide_possible_values = true
    )]
    pub lr_schedule: Option<LrSchedule>,
    /// Linear warm-up from 0 [0]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub warmup_steps: Option<u64>,
    /// Decoupled decay [0]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub weight_decay: Option<f32>,
    /// First-moment decay [0.9]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub beta1: Option<f32>,
    /// Second-moment decay [0.999]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub beta2: Option<f32>,
    /// Added to the root of the second moment [1e-8]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub eps: Option<f32>,
    /// Clip the global norm to this, 0: never [1]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub max_grad_norm: Option<f32>,
    /// per_token or per_micro_batch [per_token]
    #[arg(long, value_name = "HOW", hide_possible_values = true)]
    pub loss_normalisation: Option<LossNormalisation>,
    /// First loss scale with f16 [65536]
    #[arg(long, value_name = "X", value_parser = number::<f32>)]
    pub initial_loss_scale: Option<f32>,
    /// Non-finite steps in a row that end the run [20]
    #[arg(long, value_name = "N", value_parser = whole::<u32>)]
    pub max_skipped_steps: Option<u32>,
}

/// `[pipeline]`: devices, schedule, recomputation.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Pipeline")]
pub struct RawPipeline {
    /// One stage each: cpu, or a CUDA number [all GPUs, else cpu]
    #[arg(long, value_name = "D,D,..", value_delimiter = ',')]
    pub devices: Option<Vec<Device>>,
    /// Blocks per stage [by cost]
    #[arg(long, value_name = "N,N,..", value_delimiter = ',', value_parser = whole::<usize>)]
    pub balance: Option<Vec<usize>>,
    /// 1f1b, gpipe or interleaved [1f1b]
    #[arg(long, value_name = "NAME", hide_possible_values = true)]
    pub schedule: Option<ScheduleKind>,
    /// Interleaved: parts of the model per stage [2]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub virtual_stages: Option<usize>,
    /// none, attention_free, block or auto [auto]
    #[arg(long, value_name = "WHAT", hide_possible_values = true)]
    pub recompute: Option<Recompute>,
    /// CPU threads of all stages together [all cores]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub threads: Option<usize>,
    /// Most of each device, e.g. 12GiB [what is free]
    #[arg(long, value_name = "BYTES")]
    pub memory_per_device: Option<ByteSize>,
    /// Between GPUs: auto, nccl or p2p [auto]
    #[arg(long, value_name = "HOW", hide_possible_values = true)]
    pub transport: Option<TransportKind>,
    /// Seconds without a sign of life that end the run [120]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub stall_timeout: Option<u64>,
}

/// `[run]`: length of the run, output, checkpoints.
#[derive(Clone, Debug, Default, Deserialize, Args)]
#[serde(deny_unknown_fields, default)]
#[command(next_help_heading = "Run")]
pub struct RawRun {
    /// Checkpoints, metrics, adapter [output]
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Optimiser steps; or give --epochs
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub max_steps: Option<u64>,
    /// Times through the rows
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub epochs: Option<u64>,
    /// Sequences per micro-batch [1]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub micro_batch_size: Option<usize>,
    /// Tokens instead of sequences per micro-batch
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub micro_batch_tokens: Option<usize>,
    /// Micro-batches per step [8]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub gradient_accumulation: Option<usize>,
    /// Checkpoint every N steps, 0: at the end [0]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub save_steps: Option<u64>,
    /// Newest checkpoints to keep, 0: all [3]
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub save_total_limit: Option<usize>,
    /// Key of all random numbers [42]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub seed: Option<u64>,
    /// Continue: newest checkpoint, or this one
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = "latest")]
    pub resume: Option<Resume>,
    /// Validation loss every N steps, 0: at the end [0]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub eval_steps: Option<u64>,
    /// Progress line every N steps [1]
    #[arg(long, value_name = "N", value_parser = whole::<u64>)]
    pub log_steps: Option<u64>,
}

/// Parses a flag that counts something.
fn whole<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse()
        .map_err(|_| "expected a whole number, 0 or more".to_owned())
}

/// Parses a flag that measures something.
fn number<T: FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "expected a number".to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::error::Key;
    use super::super::keys::SECTIONS;
    use super::*;

    #[test]
    fn every_key_is_a_field_and_a_flag_and_there_are_no_others() {
        let command = RawConfig::augment_args(clap::Command::new("test"));
        let flags: Vec<_> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long())
            .collect();
        let mut keys = 0;
        for (section, names) in SECTIONS {
            for name in *names {
                let flag = Key { section, name }.flag();
                assert!(flags.contains(&&flag[2..]), "{flag}");
                let wrong = format!("[{section}]\n{name} = 1979-05-27");
                let error = toml::from_str::<RawConfig>(&wrong).unwrap_err();
                assert!(!error.message().contains("unknown field"), "{error}");
                keys += 1;
            }
        }
        assert_eq!(flags.len(), keys);
    }
}
