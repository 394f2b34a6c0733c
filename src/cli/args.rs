//! The command line's shape.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "help texts show defaults in brackets"
)]

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::bench::LayoutWord;
use crate::config::byte_size::ByteSize;
use crate::config::error::ConfigError;
use crate::config::file::ConfigFile;
use crate::config::layers::Layers;
use crate::config::model_size::ModelSize;
use crate::config::paths::Paths;
use crate::config::raw::{AdapterKind, RawConfig};
use crate::config::run::{
    BadRowPolicy, Device, Precision, ProductSums, Quantization, Recompute, RotaryPrecision,
    RunConfig, ScheduleKind, TemplateKind, TransportKind,
};
use crate::export::{Format, TorchDtype};
use crate::plan::PlanOptions;

/// Model-parallel fine-tuning of ChatGLM and GLM-4: LoRA, P-Tuning v2, whole model
#[derive(Debug, Parser)]
#[command(
    name = "mp-train",
    version,
    args_conflicts_with_subcommands = true,
    allow_negative_numbers = true,
    max_term_width = 100,
    override_usage = "mp-train [train] [--config FILE] [OPTIONS]\n       mp-train <COMMAND>",
    after_help = "Without a command, mp-train trains. Every TOML key has a flag, and the flag wins."
)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub train: TrainArgs,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Train, or continue a run
    #[command(allow_negative_numbers = true)]
    Train(Box<TrainArgs>),
    /// Show what each device would hold and how fast it would go, without loading the model
    #[command(
        allow_negative_numbers = true,
        after_help = "With --devices and --memory-per-device no GPU is needed; with --size and \
                      --sequence-length neither a model folder nor data."
    )]
    Plan(Box<PlanArgs>),
    /// Look at model, tokenizer, data, devices and output of a run, and report all that is wrong
    #[command(
        allow_negative_numbers = true,
        after_help = "Takes the configuration of a run. Exit code 0: it would go through; 2: it would not."
    )]
    Check(Box<CheckArgs>),
    /// Answer prompts from a file, text or token ids
    #[command(
        allow_negative_numbers = true,
        after_help = "Greedy, unless --temperature, --top-k or --top-p is given."
    )]
    Generate(GenerateArgs),
    /// Measure loss, perplexity, BLEU-4 and ROUGE of a model's answers to a data set
    #[command(
        allow_negative_numbers = true,
        after_help = "Rows are read and asked as in training, by the template saved with the adapter. \
                      Greedy, unless --temperature, --top-k or --top-p is given; THUDM's evaluation \
                      samples: --temperature 0.95 --top-k 50 --top-p 0.7. Scores are those of jieba, \
                      rouge_chinese and nltk, an empty answer is worth 0."
    )]
    Eval(EvalArgs),
    /// Talk to a model
    #[command(
        allow_negative_numbers = true,
        after_help = "/clear forgets what was said, /quit or Ctrl-D ends, Ctrl-C stops an answer. \
                      Questions can come from a pipe, one per line. Samples as THUDM's chat does: \
                      temperature 0.95, top-k 50, top-p 0.7."
    )]
    Chat(ChatArgs),
    /// Make a folder that other programs load: a merged model, a PEFT adapter, a THUDM prefix
    #[command(
        after_help = "A LoRA adapter is added into the weights in f32, which are rounded once. A prefix \
                      (P-Tuning v2) cannot be: it is written as THUDM's ptuning does. Of a quantised \
                      folder the weights become float16 again, unless --quantization is given."
    )]
    Export(ExportArgs),
    /// Teach a tiny model who it is, from nothing, in about a minute
    Demo(DemoArgs),
    /// Measure tokens per second and memory with made-up weights of a named size
    Bench(BenchArgs),
    /// List GPUs, driver and libraries, and what this build can do with them
    Devices,
    /// Try copies between GPUs, as in 0-1: what a run does before it starts, in a process of its own
    #[command(hide = true)]
    Probe {
        /// From and to
        pairs: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print warnings only
    #[arg(long, help_heading = "Run")]
    pub quiet: bool,
    /// Print the resolved TOML and exit
    #[arg(long, help_heading = "Run")]
    pub print_config: bool,
}

/// A TOML file and the flags that override it.
#[derive(Debug, Args)]
pub(super) struct ConfigArgs {
    /// TOML file; relative paths in it start at the current directory
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub flags: RawConfig,
}

impl ConfigArgs {
    /// Whether nothing says which model to train.
    pub fn is_bare(&self) -> bool {
        self.config.is_none() && self.flags.model.path.is_none()
    }

    pub fn resolve(&self) -> Result<RunConfig, ConfigError> {
        self.resolve_with(|_, _| {})
    }

    /// As [`ConfigArgs::resolve`], after `fill`, and then the adapter to start from, have put into the
    /// flags (the first) what neither they nor the file (the second) say.
    fn resolve_with(
        &self,
        fill: impl FnOnce(&mut RawConfig, Option<&RawConfig>),
    ) -> Result<RunConfig, ConfigError> {
        let file = self.config.as_deref().map(ConfigFile::read).transpose()?;
        let mut flags = self.flags.clone();
        let in_file = file.as_ref().map(|file| &file.raw);
        fill(&mut flags, in_file);
        super::adapter_settings::fill(&mut flags, in_file);
        if flags.pipeline.devices.is_none()
            && in_file.is_none_or(|raw| raw.pipeline.devices.is_none())
        {
            let in_file = in_file.and_then(|raw| raw.model.precision);
            let precision = flags.model.precision.or(in_file);
            flags.pipeline.devices = super::devices::visible_gpus(precision);
        }
        Layers { flags, file }.resolve()
    }
}

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print the findings as JSON
    #[arg(long, help_heading = "Check")]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// A model of this size in place of a folder: chatglm-6b, chatglm2-6b, glm-4-9b, small or tiny
    #[arg(
        long,
        value_name = "SIZE",
        hide_possible_values = true,
        help_heading = "Plan"
    )]
    pub size: Option<ModelSize>,
    /// Tokens of every row, in place of data
    #[arg(long, value_name = "N", help_heading = "Plan",
        value_parser = clap::value_parser!(u32).range(1..))]
    pub sequence_length: Option<u32>,
    /// Share of these tokens with a target
    #[arg(long, value_name = "X", default_value_t = 0.5, help_heading = "Plan",
        value_parser = share)]
    pub target_share: f64,
    /// 10^12 operations per second that a device sustains [50; 0.1 on cpu]
    #[arg(long, value_name = "X", help_heading = "Plan", value_parser = above_zero)]
    pub tflops: Option<f64>,
    /// 10^9 bytes per second between two devices
    #[arg(long, value_name = "X", default_value_t = PlanOptions::USUAL_LINK_GBPS,
        help_heading = "Plan", value_parser = above_zero)]
    pub link_gbps: f64,
}

impl PlanArgs {
    /// The configuration, where what a plan does not need is made up if it was left out.
    pub fn resolve(&self) -> Result<RunConfig, ConfigError> {
        self.config.resolve_with(|flags, in_file| {
            let said = |says: fn(&RawConfig) -> bool| in_file.is_some_and(says);
            if self.size.is_some() && !said(|raw| raw.model.path.is_some()) {
                flags.model.path.get_or_insert("none".into());
            }
            if self.sequence_length.is_some() && !said(|raw| raw.data.train.is_some()) {
                flags.data.train.get_or_insert(Paths(vec!["none".into()]));
            }
            let has_end = |raw: &RawConfig| raw.run.max_steps.or(raw.run.epochs).is_some();
            if !has_end(flags) && !said(has_end) {
                flags.run.max_steps = Some(1);
            }
        })
    }
}

/// Parses a share.
fn share(text: &str) -> Result<f64, String> {
    let value = text.parse().ok();
    let value = value.filter(|value| (0.0..=1.0).contains(value));
    value.ok_or_else(|| "expected a number from 0 to 1".to_owned())
}

/// Parses a speed.
fn above_zero(text: &str) -> Result<f64, String> {
    let value = text.parse().ok();
    let value = value.filter(|value: &f64| *value > 0.0 && value.is_finite());
    value.ok_or_else(|| "expected a number above 0".to_owned())
}

/// A model, what is laid over it, and where it computes.
#[derive(Debug, Args)]
pub(super) struct ModelArgs {
    /// Model folder: config.json, weights and, for text, the tokenizer
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Adapter folder (PEFT LoRA or prefix)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Form of questions: alpaca, prompt_response or plain_text [that of the training]
    #[arg(long, value_name = "FORM", hide_possible_values = true)]
    pub template: Option<TemplateKind>,
    /// Go on after the end-of-answer id
    #[arg(long)]
    pub no_stop_at_eop: bool,
    /// One stage each: cpu, or a CUDA number [all GPUs, else cpu]
    #[arg(long, value_name = "D,D,..", value_delimiter = ',')]
    pub devices: Option<Vec<Device>>,
    /// Blocks per stage [by cost]
    #[arg(long, value_name = "N,N,..", value_delimiter = ',',
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub balance: Option<Vec<u32>>,
    /// Storage of weights and activations [f32 on cpu]
    #[arg(long, value_name = "f32|f16", hide_possible_values = true)]
    pub precision: Option<Precision>,
    /// Storage of the linear layers, none, int8 or int4; that of the training [the folder's]
    #[arg(long, value_name = "WHAT", hide_possible_values = true)]
    pub quantization: Option<Quantization>,
    /// Rounding of the rotary tables; that of the training [original with f16]
    #[arg(long, value_name = "original|f32", hide_possible_values = true)]
    pub rotary_table: Option<RotaryPrecision>,
    /// CPU threads of all stages together [all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub threads: Option<u32>,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Divides logits; 0: always the likeliest token
    #[arg(long, value_name = "X")]
    pub temperature: Option<f64>,
    /// Draw from the N likeliest tokens; 0: from all
    #[arg(long, value_name = "N")]
    pub top_k: Option<u32>,
    /// Draw from the likeliest tokens that reach this probability together
    #[arg(long, value_name = "P")]
    pub top_p: Option<f64>,
    /// Makes tokens that were there before less likely, if above 1
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f64>,
    /// Key of the random numbers [42]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// Longest answer that can be asked for.
const MAX_ANSWER: i64 = 65_536;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompts, JSONL: {"input_ids": [..]}, {"prompt": .., "history": [[q, a], ..]} or
    /// {"instruction": .., "input": ..}; - is standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub input: PathBuf,
    /// Answers, JSONL: each row with "answer" (of text) and "new_tokens" added; - is standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
    /// Most ids per answer, 1 to 65536
    #[arg(long, value_name = "N", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..=MAX_ANSWER))]
    pub max_new_tokens: u32,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Rows with their answers: files, folders, globs, in every form that can be trained on
    #[arg(long, value_name = "PATH,..")]
    pub data: Paths,
    /// Measure loss and perplexity, generate nothing
    #[arg(long)]
    pub loss_only: bool,
    /// Write rows with prompt, label, prediction and scores, JSONL; - is standard output
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    /// Write what is measured as JSON; - is standard output
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Only the first N rows [all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rows: Option<u32>,
    /// Most ids per answer, 1 to 65536 [512 with the question]
    #[arg(long, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=MAX_ANSWER))]
    pub max_new_tokens: Option<u32>,
    /// Question, instruction or conversation [that of the training]
    #[arg(long, value_name = "NAME", help_heading = "Columns")]
    pub prompt_column: Option<String>,
    /// Alpaca's input [that of the training]
    #[arg(long, value_name = "NAME", help_heading = "Columns")]
    pub input_column: Option<String>,
    /// Answer [that of the training]
    #[arg(long, value_name = "NAME", help_heading = "Columns")]
    pub response_column: Option<String>,
    /// Earlier turns [that of the training]
    #[arg(long, value_name = "NAME", help_heading = "Columns")]
    pub history_column: Option<String>,
    /// Most tokens of a question [that of the training]
    #[arg(long, value_name = "N", help_heading = "Columns",
        value_parser = clap::value_parser!(u32).range(1..=MAX_ANSWER))]
    pub max_source_length: Option<u32>,
    /// Most tokens of an answer [that of the training]
    #[arg(long, value_name = "N", help_heading = "Columns",
        value_parser = clap::value_parser!(u32).range(1..=MAX_ANSWER))]
    pub max_target_length: Option<u32>,
    /// An unusable row: fatal or skip [fatal]
    #[arg(
        long,
        value_name = "fatal|skip",
        hide_possible_values = true,
        help_heading = "Columns"
    )]
    pub bad_rows: Option<BadRowPolicy>,
    /// Print warnings and the result only
    #[arg(long)]
    pub quiet: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Most ids per answer, 1 to 65536 [512, or half the model's longest sequence]
    #[arg(long, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=MAX_ANSWER))]
    pub max_new_tokens: Option<u32>,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// chatglm-6b, chatglm2-6b, glm-4-9b, small or tiny
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "chatglm-6b",
        hide_possible_values = true
    )]
    pub size: ModelSize,
    /// lora, prefix or full
    #[arg(
        long,
        value_name = "KIND",
        default_value = "lora",
        hide_possible_values = true
    )]
    pub adapter: AdapterKind,
    /// LoRA rank
    #[arg(long, value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub r: u32,
    /// Prefix length
    #[arg(long, value_name = "N", default_value_t = 128,
        value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub pre_seq_len: u32,
    /// One stage each: cpu, or a CUDA number
    #[arg(
        long,
        value_name = "D,D,..",
        value_delimiter = ',',
        default_value = "0"
    )]
    pub devices: Vec<Device>,
    /// Several in one run: auto (all schedules on 1, 2, .. of the devices), or a list of
    /// STAGES[:SCHEDULE][:MICRO_BATCHES] such as 1,2,2:gpipe,2:interleaved2:16
    /// [all devices, --schedule]
    #[arg(long, value_name = "L,L,..", value_delimiter = ',')]
    pub layouts: Option<Vec<LayoutWord>>,
    /// Storage of weights and activations [f32 on cpu]
    #[arg(long, value_name = "f32|f16", hide_possible_values = true)]
    pub precision: Option<Precision>,
    /// Storage of the frozen linear layers: none, int8 or int4
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "none",
        hide_possible_values = true
    )]
    pub quantization: Quantization,
    /// Sums of their products on GPUs: f16 is for GeForce
    #[arg(
        long,
        value_name = "f32|f16",
        default_value = "f32",
        hide_possible_values = true
    )]
    pub product_sums: ProductSums,
    /// Rows of a micro-batch
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub micro_batch_size: u32,
    /// Tokens of a row, half of them with a target; with --lengths mixed those of the longest [512]
    #[arg(long, value_name = "N")]
    pub sequence_length: Option<u32>,
    /// Rows of several lengths: these in turn, or mixed (many short ones and a few long ones)
    #[arg(long, value_name = "N,N,..|mixed", value_parser = lengths)]
    pub lengths: Option<LengthsWord>,
    /// Micro-batches of a step
    #[arg(long, value_name = "N", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub gradient_accumulation: u32,
    /// none, attention_free, block or auto
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub recompute: Recompute,
    /// 1f1b, gpipe or interleaved
    #[arg(
        long,
        value_name = "NAME",
        default_value = "1f1b",
        hide_possible_values = true
    )]
    pub schedule: ScheduleKind,
    /// Interleaved: parts of the model per stage
    #[arg(long, value_name = "N", default_value_t = 2,
        value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub virtual_stages: u32,
    /// Between GPUs: auto, nccl or p2p
    #[arg(
        long,
        value_name = "HOW",
        default_value = "auto",
        hide_possible_values = true
    )]
    pub transport: TransportKind,
    /// Steps before the measured ones
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub warm_up: u32,
    /// Measured steps
    #[arg(long, value_name = "N", default_value_t = 5,
        value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub steps: u32,
    /// Steps measured from within after them, for kinds of work, bubble and timeline; 0 for none
    #[arg(long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(0..=1_000))]
    pub profile_steps: u32,
    /// CPU threads of all stages together [all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub threads: Option<u32>,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Write the JSON to a file too
    #[arg(long, value_name = "FILE.json")]
    pub output: Option<PathBuf>,
    /// Draw a profiled step; with several layouts a file each, their names before the extension
    #[arg(long, value_name = "FILE.svg")]
    pub timeline: Option<PathBuf>,
    /// The same as a trace for chrome://tracing and Perfetto
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// Commit of mp-train, for the JSON
    #[arg(long, value_name = "HASH")]
    pub commit: Option<String>,
}

/// What `--lengths` says.
#[derive(Clone, Debug)]
pub(super) enum LengthsWord {
    /// `mixed`.
    Mixed,
    /// `64,512`.
    Listed(Vec<usize>),
}

fn lengths(text: &str) -> Result<LengthsWord, String> {
    if text == "mixed" {
        return Ok(LengthsWord::Mixed);
    }
    let length = |part: &str| {
        part.parse().map_err(|_| {
            format!("`{part}` is no length: use numbers of tokens such as 64,512, or `mixed`")
        })
    };
    text.split(',')
        .map(length)
        .collect::<Result<_, _>>()
        .map(LengthsWord::Listed)
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Model folder: config.json, weights and, for the result, tokenizer and code
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Adapter folder (PEFT LoRA or prefix)
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Folder to make; a new or an empty one
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// merged, peft or thudm [thudm for a prefix, else merged]
    #[arg(long, value_name = "FORM", hide_possible_values = true)]
    pub format: Option<Format>,
    /// Storage of a merged model: float32, float16 or bfloat16 [that of the folder]
    #[arg(long, value_name = "TYPE", hide_possible_values = true)]
    pub dtype: Option<TorchDtype>,
    /// Linear layers of a merged model as codes: none, int8 or int4
    #[arg(
        long,
        value_name = "WHAT",
        default_value = "none",
        hide_possible_values = true
    )]
    pub quantization: Quantization,
    /// Most bytes of a file of a merged model
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = some_bytes)]
    pub max_shard_size: ByteSize,
}

/// Parses a number of bytes above 0.
fn some_bytes(text: &str) -> Result<ByteSize, String> {
    let bytes: ByteSize = text.parse()?;
    match bytes.0 {
        0 => Err("expected 1 byte or more".to_owned()),
        _ => Ok(bytes),
    }
}

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Folder to work in; a new one, or that of an earlier demo
    #[arg(long, value_name = "DIR", default_value = "mp-train-demo")]
    pub output: PathBuf,
    /// Key of all random numbers
    #[arg(long, value_name = "N", default_value_t = 42,
        value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,
    /// CPU threads of all stages together [all cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4_096))]
    pub threads: Option<u32>,
}
