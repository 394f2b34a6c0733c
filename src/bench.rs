//! `mp-train bench`: how fast a model of a named size trains here, with made-up weights and rows.

pub mod timeline;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::adapter::initial::initial_values;
use crate::adapter::{AdapterError, ParameterState};
use crate::backend::cuda;
use crate::checkpoint::synthetic::SyntheticTensors;
use crate::config::model::ModelConfig;
pub use crate::config::model_size::ModelSize;
use crate::config::run::{
    AdapterSection, Device, LossNormalisation, LrSchedule, OptimizerSection, Precision,
    Quantization, Recompute, STALL_TIMEOUT, ScheduleKind, TransportKind,
};
use crate::data::batch::{MicroBatch, Sequence, Target};
use crate::data::sampler::MicroBatchSize;
use crate::model::names::LinearSite;
use crate::model::trainables::Trainables;
use crate::model::weights;
use crate::pipeline::advice::{RowLengths, Wish};
use crate::pipeline::base::{Base, Layout, StartError};
use crate::pipeline::cost::TypicalBatch;
use crate::pipeline::failure::Failure;
use crate::pipeline::fit::{Demand, Fitted};
use crate::pipeline::messages::StepPlan;
use crate::pipeline::needs::DeviceMemory;
use crate::random::{Domain, Key};
use crate::report::FailureClass;

const SEED: u64 = 42;

/// A loss scale that does not overflow with made-up weights.
const LOSS_SCALE: f32 = 1024.0;

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct BenchOptions {
    /// The model.
    pub size: ModelSize,
    /// What is trained.
    pub adapter: AdapterSection,
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// Storage type.
    pub precision: Precision,
    /// Storage of the frozen linear layers.
    pub quantization: Quantization,
    /// Rows of a micro-batch.
    pub micro_batch_size: usize,
    /// Tokens of a row; half of them have a target.
    pub sequence_length: usize,
    /// Micro-batches of a step.
    pub gradient_accumulation: usize,
    /// What is recomputed.
    pub recompute: Recompute,
    /// Order of forwards and backwards.
    pub schedule: ScheduleKind,
    /// Steps that are not counted.
    pub warm_up: usize,
    /// Steps that are counted.
    pub steps: usize,
    /// CPU threads of all stages together.
    pub threads: usize,
    /// How activations travel between GPUs.
    pub transport: TransportKind,
    /// Parts of the model per stage, with the interleaved schedule.
    pub virtual_stages: usize,
}

/// One device of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceResult {
    /// As given.
    pub device: Device,
    /// Its name: of the GPU, or `cpu`.
    pub name: String,
    /// Blocks that it holds.
    pub blocks: usize,
    /// What it recomputed.
    pub recompute: Recompute,
    /// Bytes of weights, trainables, activations and workspace, planned and then taken at once.
    pub planned_bytes: u64,
    /// Bytes of the GPU in use after the last step, by this and any other process; planned memory,
    /// context, libraries and scratch together. Nothing on a CPU.
    pub used_bytes: Option<u64>,
}

/// What was measured.
#[derive(Clone, Debug, Serialize)]
pub struct BenchResult {
    /// Version of mp-train.
    pub version: &'static str,
    /// What was asked for.
    pub options: BenchOptions,
    /// The devices.
    pub devices: Vec<DeviceResult>,
    /// Seconds to start: weights made and loaded, kernels compiled or loaded.
    pub start_seconds: f64,
    /// Seconds of each counted step.
    pub step_seconds: Vec<f64>,
    /// Tokens of a step over the median step's seconds.
    pub tokens_per_second: f64,
    /// Share of the schedule's slots without work, by counting (a backward as long as two forwards).
    pub planned_idle: f64,
    /// Floating-point operations of a step's matrix products without what is recomputed, over the
    /// median step's seconds, in 10^12 per second.
    pub model_tflops: f64,
    /// Loss of the last step: a number, if all went well.
    pub last_loss: f32,
}

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The stages could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A stage failed.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// Loss or gradient were not finite.
    #[error("step {step}: loss or gradient is not finite; what was measured would mean nothing")]
    NotFinite {
        /// From 1.
        step: usize,
    },
    /// Rows longer than the model's.
    #[error("--sequence-length {found}: the model takes 4 to {longest} tokens")]
    SequenceLength {
        /// As asked for.
        found: usize,
        /// Of the model.
        longest: usize,
    },
}

impl BenchError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            BenchError::Start(error) => error.is_machine(),
            BenchError::Failure(failure) => failure.is_machine(),
            BenchError::NotFinite { .. } => true,
            BenchError::SequenceLength { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}

/// Trains for some steps and measures them.
///
/// # Errors
/// The stages cannot be started, one of them fails, or numbers are not finite.
pub fn run(options: &BenchOptions) -> Result<BenchResult, BenchError> {
    let config = options.size.config();
    let longest = config.max_sequence_length;
    if !(4..=longest).contains(&options.sequence_length) {
        return Err(BenchError::SequenceLength {
            found: options.sequence_length,
            longest,
        });
    }
    let began = Instant::now();
    let base = synthetic_base(config, options.quantization)?;
    let tied = base.head_source.tied;
    let trainables =
        Trainables::new(&base.config, &options.adapter, tied).map_err(StartError::Model)?;
    let layout = layout(options, &base, &trainables)?;
    let initial = |spec: &crate::adapter::ParameterSpec| {
        Ok::<_, AdapterError>(match initial_values(spec, SEED) {
            Some(values) => ParameterState::fresh(values),
            None => ParameterState::of_base(),
        })
    };
    let mut engine = base.start(&layout, trainables.clone(), Box::new(initial))?;
    let start_seconds = began.elapsed().as_secs_f64();

    let mut step_seconds = Vec::with_capacity(options.steps);
    let mut last_loss = f32::NAN;
    for step in 0..options.warm_up + options.steps {
        let plan = plan(options, &base.config, step as u64);
        let began = Instant::now();
        let outcome = engine.step(plan.clone())?;
        if step >= options.warm_up {
            step_seconds.push(began.elapsed().as_secs_f64());
        }
        if !outcome.applied {
            return Err(BenchError::NotFinite { step: step + 1 });
        }
        let sums = outcome.loss_sums.iter().zip(&plan.target_weights);
        last_loss = sums.map(|(sum, weight)| sum * weight).sum();
    }
    let seconds = median(&step_seconds);
    Ok(BenchResult {
        version: env!("CARGO_PKG_VERSION"),
        devices: devices(&base.config, &layout, &trainables)?,
        start_seconds,
        tokens_per_second: tokens(options) as f64 / seconds,
        planned_idle: layout.schedule.idle_fraction(1, 2),
        model_tflops: flops(options, &base.config) / seconds / 1e12,
        step_seconds,
        last_loss,
        options: options.clone(),
    })
}

/// A model without files.
fn synthetic_base(mut config: ModelConfig, quantization: Quantization) -> Result<Base, StartError> {
    let tensors = weights::own_tensors(&config, config.tie_word_embeddings);
    let source = SyntheticTensors::new(tensors, SEED);
    let head_source = weights::check(&source, &config)?;
    config.quantization = quantization;
    Ok(Base {
        config,
        source: Arc::new(source),
        head_source,
    })
}

fn layout(
    options: &BenchOptions,
    base: &Base,
    trainables: &Trainables,
) -> Result<Layout, StartError> {
    let (sequences, tokens) = (options.micro_batch_size, options.sequence_length);
    let demand = Demand {
        devices: options.devices.clone(),
        transport: options.transport,
        balance: None,
        precision: options.precision,
        rotary_table: options.precision.rotary_table(),
        schedule: options.schedule,
        virtual_stages: options.virtual_stages,
        micro_batches: options.gradient_accumulation,
        recompute: options.recompute,
        threads: options.threads,
        stall_timeout: Duration::from_secs(STALL_TIMEOUT),
        max_rows: sequences * tokens,
        max_sequences: sequences,
        typical: TypicalBatch::new(sequences as f64, tokens as f64, 0.5),
    };
    let memory = DeviceMemory::of(&options.devices, None, options.transport)?;
    let Fitted { layout, shortage } = demand.fit_or_nearly(&base.config, trainables, &memory)?;
    match shortage.filter(|shortage| shortage.firm) {
        None => Ok(layout),
        Some(shortage) => {
            let wish = Wish {
                demand: &demand,
                model: &base.config,
                trainables,
                memory: &memory,
                size: MicroBatchSize::Rows(sequences),
                lengths: &RowLengths::uniform(tokens),
            };
            Err(wish.refuse(shortage).into())
        }
    }
}

fn plan(options: &BenchOptions, config: &ModelConfig, step: u64) -> StepPlan {
    let micro_batch = |index| micro_batch(options, config, step, index);
    let micro_batches: Vec<_> = (0..options.gradient_accumulation as u64)
        .map(micro_batch)
        .collect();
    let targets: usize = micro_batches.iter().map(|batch| batch.targets.len()).sum();
    StepPlan {
        step,
        updates: step,
        learning_rate: 1e-4,
        loss_scale: match options.precision {
            Precision::F32 => 1.0,
            Precision::F16 => LOSS_SCALE,
        },
        // Every target of the step weighs the same.
        target_weights: vec![1.0 / targets as f32; micro_batches.len()],
        micro_batches,
        optimizer: OptimizerSection {
            learning_rate: 1e-4,
            lr_schedule: LrSchedule::Constant,
            warmup_steps: 0,
            weight_decay: 0.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            max_grad_norm: 1.0,
            loss_normalisation: LossNormalisation::PerToken,
            initial_loss_scale: 65_536.0,
            max_skipped_steps: 1,
        },
        seed: SEED,
    }
}

/// Rows of random ids: the first half is the context, and each token of the second half is a target
/// of the one before it, as in a row of prompt and answer.
fn micro_batch(options: &BenchOptions, config: &ModelConfig, step: u64, index: u64) -> MicroBatch {
    let key = Key::new(SEED, Domain::Sampling).fold(step).fold(index);
    let mut random = key.stream();
    let len = options.sequence_length;
    let half = len / 2;
    let context_length = context_length(config, len);
    let mut batch = MicroBatch::default();
    for _ in 0..options.micro_batch_size {
        let start = batch.tokens();
        for t in 0..len {
            let id = random.below(config.vocab_size as u64 - 8) as u32;
            batch.input_ids.push(id);
            let (position, inside) = match context_length {
                0 => (t, 0),
                context => (t.min(context), (t + 1).saturating_sub(context)),
            };
            batch.position.push(position as u32);
            batch.block_position.push(inside as u32);
        }
        batch.sequences.push(Sequence {
            start,
            len,
            context_length,
        });
        batch.targets.extend((half..len - 1).map(|t| Target {
            row: (start + t) as u32,
            id: batch.input_ids[start + t + 1],
        }));
    }
    batch
}

/// Tokens that are visible both ways: the first half in ChatGLM-6B, none in later generations.
fn context_length(config: &ModelConfig, len: usize) -> usize {
    config.context_ids.map_or(0, |_| len / 2)
}

fn tokens(options: &BenchOptions) -> usize {
    options.gradient_accumulation * options.micro_batch_size * options.sequence_length
}

/// Matrix products of a step: 2 per weight and token forward and 2 for the gradient of the input, 2
/// more where weights are trained; lm_head on the rows with a target; attention's two products over
/// the visible pairs, forward once and backward twice.
fn flops(options: &BenchOptions, config: &ModelConfig) -> f64 {
    let h = config.hidden_size as f64;
    let layers = config.num_layers as f64;
    let t = options.sequence_length as f64;
    let passes = match options.adapter {
        AdapterSection::Full(_) => 3.0,
        AdapterSection::Lora(_) | AdapterSection::Prefix(_) => 2.0,
    };
    let linear = 2.0 * layers * LinearSite::weights(config, |_| true) * t * passes;
    let head = 2.0 * config.vocab_size as f64 * h * (t / 2.0) * passes;
    let context = context_length(config, options.sequence_length) as f64;
    let pairs = t * t / 2.0 + context * context / 2.0;
    let attention = 3.0 * layers * 4.0 * config.query_width() as f64 * pairs;
    let rows = (options.gradient_accumulation * options.micro_batch_size) as f64;
    rows * (linear + head + attention)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[len / 2],
        len => (sorted[len / 2 - 1] + sorted[len / 2]) / 2.0,
    }
}

fn devices(
    config: &ModelConfig,
    layout: &Layout,
    trainables: &Trainables,
) -> Result<Vec<DeviceResult>, StartError> {
    let on_gpus = layout
        .devices
        .iter()
        .any(|device| device.ordinal().is_some());
    let gpus = match on_gpus {
        true => cuda::survey()?.gpus,
        false => Vec::new(),
    };
    let result = |(rank, &device): (usize, &Device)| {
        let gpu = gpus
            .iter()
            .find(|gpu| Some(gpu.ordinal) == device.ordinal());
        let capability = gpu.map(|gpu| gpu.capability);
        DeviceResult {
            device,
            name: gpu.map_or("cpu".to_owned(), |gpu| gpu.name.clone()),
            blocks: layout.stages[rank]
                .chunks
                .iter()
                .map(ExactSizeIterator::len)
                .sum(),
            recompute: layout.recompute[rank],
            planned_bytes: layout.bytes(config, trainables, rank, capability).total(),
            used_bytes: gpu.map(|gpu| gpu.total_memory - gpu.free_memory),
        }
    };
    Ok(layout.devices.iter().enumerate().map(result).collect())
}
