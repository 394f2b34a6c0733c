//! The pipeline, on as many stages as asked for.

use std::sync::Arc;
use std::time::Duration;

use mp_train::adapter::{AdapterError, ParameterSpec, ParameterState};
use mp_train::comm::in_process;
use mp_train::config::run::{Device, Precision, Recompute, STALL_TIMEOUT, ScheduleKind};
use mp_train::model::rotary::RotaryPrecision;
use mp_train::model::trainables::Trainables;
use mp_train::pipeline::launch::{Blueprint, Engine, launch};
use mp_train::pipeline::partition;
use mp_train::pipeline::schedule::Schedule;

use super::single::Parts;
use super::{Golden, Outcome};

/// Everything about a run that must not change its numbers.
#[derive(Clone, Copy, Debug)]
pub struct Configuration {
    pub stages: usize,
    pub schedule: ScheduleKind,
    pub recompute: Recompute,
    pub threads: usize,
}

impl Configuration {
    /// Two chunks per stage where they are interleaved.
    fn virtual_stages(&self) -> usize {
        match self.schedule {
            ScheduleKind::Interleaved => 2,
            ScheduleKind::OneForwardOneBackward | ScheduleKind::Gpipe => 1,
        }
    }

    /// Whether a model of `blocks` blocks and a step of `micro_batches` can be laid out so.
    pub fn is_possible(&self, blocks: usize, micro_batches: usize) -> bool {
        let divides = micro_batches.is_multiple_of(self.stages);
        self.stages * self.virtual_stages() <= blocks
            && (self.schedule != ScheduleKind::Interleaved || divides)
    }

    /// One stage, one thread, nothing recomputed.
    pub const PLAIN: Configuration = Configuration {
        stages: 1,
        schedule: ScheduleKind::OneForwardOneBackward,
        recompute: Recompute::None,
        threads: 1,
    };
}

/// What the stages must have room for.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    pub rows: usize,
    pub sequences: usize,
    pub micro_batches: usize,
}

/// Where trainable tensors get their values from.
pub type Values = Arc<dyn Fn(&ParameterSpec) -> Result<ParameterState, AdapterError> + Send + Sync>;

/// Up to four stages, where the model has so many blocks. Results are the same bits however the stages
/// are laid out, which f32 shows in full; in f16, emulated GPUs above all, one cut is enough.
pub fn stage_counts<B: Golden>(blocks: usize) -> std::ops::RangeInclusive<usize> {
    let most = match B::PRECISION {
        Precision::F32 => 4,
        Precision::F16 => 2,
    };
    1..=blocks.min(most)
}

/// Starts the stages of a model as it is, adapter and all.
pub fn start<B: Golden>(
    parts: &Parts<'_>,
    configuration: Configuration,
    room: Room,
    values: Values,
) -> Outcome<Engine> {
    let tied = parts.head_source.tied;
    let trainables = parts.adapter.trainables(&parts.config, tied)?;
    start_training::<B>(parts, configuration, room, trainables, values)
}

/// Starts the stages of a run that trains these tensors.
pub fn start_training<B: Golden>(
    parts: &Parts<'_>,
    configuration: Configuration,
    room: Room,
    trainables: Trainables,
    values: Values,
) -> Outcome<Engine> {
    let config = &parts.config;
    let Configuration {
        stages,
        schedule,
        recompute,
        threads,
    } = configuration;
    let virtual_stages = configuration.virtual_stages();
    let blueprint = Blueprint {
        config: config.clone(),
        source: Arc::clone(&parts.source),
        head_source: parts.head_source.clone(),
        trainables,
        initial: Box::new(move |spec| values(spec)),
        devices: vec![Device::Cpu; stages],
        stages: partition::by_cost(config.num_layers, stages, virtual_stages, 1.0)?,
        schedule: Schedule::build(schedule, stages, virtual_stages, room.micro_batches)?,
        recompute: vec![recompute; stages],
        max_rows: room.rows,
        max_sequences: room.sequences,
        rotary: RotaryPrecision::F32,
        product_sums: parts.family.product_sums,
        threads,
        stall_timeout: Duration::from_secs(STALL_TIMEOUT),
    };
    let transports = in_process::connect(stages);
    Ok(launch(blueprint, transports, |_, threads, _| {
        B::open(threads)
    })?)
}
