//! One layout measured: an engine started, warmed up, its steps counted, then profiled.

use std::time::{Duration, Instant};

use super::BenchError;
use super::flops::Flops;
use super::machine::{MeasuredAs, MemoryBefore, ResidentMemory};
use super::matmul::MatmulRate;
use super::options::{BenchOptions, LayoutChoice};
use super::profile::{Profiled, typical};
use super::result::{DeviceMemoryResult, Measurement, Mfu, Seconds, StageResult};
use super::rows::{RowCounts, micro_batches};
use super::{SEED, timeline};
use crate::adapter::initial::initial_values;
use crate::adapter::{AdapterError, ParameterState};
use crate::config::run::{
    Device, LossNormalisation, LrSchedule, OptimizerSection, Precision, STALL_TIMEOUT,
};
use crate::data::batch::MicroBatch;
use crate::data::sampler::MicroBatchSize;
use crate::model::trainables::Trainables;
use crate::pipeline::advice::{RowLengths, Wish};
use crate::pipeline::base::{Base, Layout, StartError};
use crate::pipeline::cost::TypicalBatch;
use crate::pipeline::fit::{Demand, Fitted};
use crate::pipeline::launch::Engine;
use crate::pipeline::messages::{StepOutcome, StepPlan};
use crate::pipeline::needs::DeviceMemory;
use crate::pipeline::profile::StepProfile;
use crate::report::timeline::Timeline;

/// A loss scale that does not overflow with made-up weights.
const LOSS_SCALE: f32 = 1024.0;

/// A profiled step, for those who want to see it.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Its layout.
    pub layout: LayoutChoice,
    /// The step whose time was in the middle.
    pub timeline: Timeline,
}

/// What all layouts have in common.
pub struct Bench<'a> {
    /// What is measured.
    pub options: &'a BenchOptions,
    /// The model.
    pub base: &'a Base,
    /// What is trained.
    pub trainables: &'a Trainables,
    /// How fast each device multiplies matrices.
    pub matmul: &'a [MatmulRate],
    /// Number and compute capability, times ten, of each GPU.
    pub capabilities: Vec<(u32, u32)>,
    /// Memory in use before anything was started.
    pub before: MemoryBefore,
}

impl Bench<'_> {
    /// Measures a layout; `show` gets the profiled step, where one was asked for.
    ///
    /// # Errors
    /// The stages cannot be started, one of them fails, or numbers are not finite.
    pub fn measure(
        &self,
        choice: LayoutChoice,
        show: &mut dyn FnMut(Picture),
    ) -> Result<Measurement, BenchError> {
        let options = self.options;
        let resident = ResidentMemory::watch();
        let began = Instant::now();
        let lengths = options
            .lengths
            .of_rows(choice.micro_batches * options.micro_batch_size);
        let batches = |step| -> Vec<MicroBatch> {
            micro_batches(&lengths, options.micro_batch_size, &self.base.config, step)
        };
        let layout = self.layout(choice, &batches(0))?;
        let initial = |spec: &crate::adapter::ParameterSpec| {
            Ok::<_, AdapterError>(match initial_values(spec, SEED) {
                Some(values) => ParameterState::fresh(values),
                None => ParameterState::of_base(),
            })
        };
        let trainables = self.trainables.clone();
        let mut engine = self.base.start(&layout, trainables, Box::new(initial))?;
        let start_seconds = began.elapsed().as_secs_f64();

        let counted = options.warm_up + options.steps;
        let mut steps = Vec::with_capacity(options.steps);
        let mut last_loss = f32::NAN;
        for step in 0..counted {
            let plan = plan(options.precision, batches(step as u64), step);
            let weights = plan.target_weights.clone();
            let began = Instant::now();
            let outcome = engine.step(plan)?;
            if step >= options.warm_up {
                steps.push(began.elapsed().as_secs_f64());
            }
            last_loss = loss(step, &outcome, &weights)?;
        }
        let memory = self.memory(&layout, resident)?;
        let profiles = self.profile(&mut engine, &batches)?;
        if let Some(profile) = typical(&profiles) {
            let devices: Vec<String> = layout.devices.iter().map(ToString::to_string).collect();
            let title = format!("{}: one training step, {choice}", options.size.name());
            let timeline = timeline::timeline(title, profile, &devices);
            show(Picture {
                layout: choice,
                timeline,
            });
        }
        let rows = batches(0);
        let shape = |batch: &MicroBatch| batch.sequences.clone();
        let alike = rows
            .windows(2)
            .all(|pair| shape(&pair[0]) == shape(&pair[1]));
        let rows = RowCounts::of(&rows);
        let step_seconds = Seconds::of(steps);
        let needed_flops = Flops::needed(&self.base.config, self.trainables, &rows);
        let model_tflops = needed_flops.total / step_seconds.median / 1e12;
        Ok(Measurement {
            tokens_per_second: rows.tokens as f64 / step_seconds.median,
            samples_per_second: rows.samples as f64 / step_seconds.median,
            rows,
            needed_flops,
            model_tflops,
            mfu: self.mfu(&layout.devices, model_tflops),
            step_seconds,
            bubble_by_formula: layout.schedule.bubble(),
            profile: Profiled::of(&layout.schedule, &profiles, engine.transfers(), alike),
            stages: self.stages(&layout),
            memory,
            transport: engine.transport().to_owned(),
            start_seconds,
            last_loss,
        })
    }

    /// Steps measured from within, after the counted ones.
    fn profile(
        &self,
        engine: &mut Engine,
        batches: &dyn Fn(u64) -> Vec<MicroBatch>,
    ) -> Result<Vec<StepProfile>, BenchError> {
        let first = self.options.warm_up + self.options.steps;
        let mut profiles = Vec::with_capacity(self.options.profile_steps);
        for step in first..first + self.options.profile_steps {
            let plan = plan(self.options.precision, batches(step as u64), step);
            let weights = plan.target_weights.clone();
            let (outcome, profile) = engine.profile_step(plan)?;
            loss(step, &outcome, &weights)?;
            profiles.push(profile);
        }
        Ok(profiles)
    }

    fn layout(&self, choice: LayoutChoice, batches: &[MicroBatch]) -> Result<Layout, StartError> {
        let options = self.options;
        let devices = options.devices[..choice.stages].to_vec();
        let counts = RowCounts::of(batches);
        let per_batch = |count: u64| count as f64 / batches.len().max(1) as f64;
        let most = |of: fn(&MicroBatch) -> usize| batches.iter().map(of).max().unwrap_or(0);
        let demand = Demand {
            devices,
            transport: options.transport,
            balance: None,
            precision: options.precision,
            rotary_table: options.precision.rotary_table(),
            product_sums: options.product_sums,
            schedule: choice.schedule,
            virtual_stages: choice.virtual_stages,
            micro_batches: choice.micro_batches,
            recompute: options.recompute,
            threads: options.threads,
            stall_timeout: Duration::from_secs(STALL_TIMEOUT),
            max_rows: most(MicroBatch::tokens),
            max_sequences: most(|batch| batch.sequences.len()),
            typical: TypicalBatch {
                rows: per_batch(counts.tokens),
                pairs: per_batch(counts.visible_pairs),
                target_share: counts.targets as f64 / counts.tokens.max(1) as f64,
            },
        };
        let memory = DeviceMemory::of(&demand.devices, None, options.transport)?;
        let (model, trainables) = (&self.base.config, self.trainables);
        let Fitted { layout, shortage } = demand.fit_or_nearly(model, trainables, &memory)?;
        match shortage.filter(|shortage| shortage.firm) {
            None => Ok(layout),
            Some(shortage) => {
                let wish = Wish {
                    demand: &demand,
                    model,
                    trainables,
                    memory: &memory,
                    size: MicroBatchSize::Rows(options.micro_batch_size),
                    lengths: &RowLengths::uniform(options.lengths.range().1),
                };
                Err(wish.refuse(shortage).into())
            }
        }
    }

    fn mfu(&self, devices: &[Device], model_tflops: f64) -> Mfu {
        let used = |rate: &&MatmulRate| devices.contains(&rate.device);
        let rates = || self.matmul.iter().filter(used);
        let measured: f64 = rates().map(|rate| rate.tflops).sum();
        let data_sheets: Option<f64> = rates().map(|rate| rate.data_sheet_tflops).sum();
        Mfu {
            of_measured_matmul: model_tflops / measured,
            of_data_sheet: data_sheets.map(|tflops| model_tflops / tflops),
        }
    }

    fn stages(&self, layout: &Layout) -> Vec<StageResult> {
        let stage = |(rank, &device): (usize, &Device)| StageResult {
            device,
            blocks: layout.stages[rank]
                .chunks
                .iter()
                .map(ExactSizeIterator::len)
                .sum(),
            recompute: layout.recompute[rank],
            planned_bytes: self.planned_bytes(layout, rank),
        };
        layout.devices.iter().enumerate().map(stage).collect()
    }

    fn planned_bytes(&self, layout: &Layout, rank: usize) -> u64 {
        let ordinal = layout.devices[rank].ordinal();
        let mut known = self.capabilities.iter();
        let capability = known.find(|(number, _)| Some(*number) == ordinal);
        let capability = capability.map(|(_, capability)| *capability);
        let bytes = layout.bytes(&self.base.config, self.trainables, rank, capability);
        bytes.total()
    }

    /// Each device's memory, while the stages hold it.
    fn memory(
        &self,
        layout: &Layout,
        resident: Option<ResidentMemory>,
    ) -> Result<Vec<DeviceMemoryResult>, StartError> {
        let mut all: Vec<DeviceMemoryResult> = Vec::new();
        let gpus = layout.devices.iter().any(|&device| device != Device::Cpu);
        let (rises, gpu_measured_as) = match gpus {
            true => self.before.rise()?,
            false => (Vec::new(), MeasuredAs::ResidentRise),
        };
        for (rank, &device) in layout.devices.iter().enumerate() {
            let planned_bytes = self.planned_bytes(layout, rank);
            if let Some(memory) = all.iter_mut().find(|memory| memory.device == device) {
                memory.planned_bytes += planned_bytes;
                continue;
            }
            let (peak_bytes, measured_as) = match device {
                Device::Cpu => (
                    resident.and_then(ResidentMemory::peak_rise),
                    MeasuredAs::ResidentRise,
                ),
                Device::Cuda(ordinal) => {
                    let mut rises = rises.iter();
                    let rise = rises.find(|(number, _)| *number == ordinal);
                    (rise.map(|(_, bytes)| *bytes), gpu_measured_as)
                }
            };
            all.push(DeviceMemoryResult {
                device,
                planned_bytes,
                peak_bytes,
                measured_as,
            });
        }
        Ok(all)
    }
}

/// The loss of a step that was applied.
fn loss(step: usize, outcome: &StepOutcome, weights: &[f32]) -> Result<f32, BenchError> {
    if !outcome.applied {
        return Err(BenchError::NotFinite { step: step + 1 });
    }
    let sums = outcome.loss_sums.iter().zip(weights);
    Ok(sums.map(|(sum, weight)| sum * weight).sum())
}

fn plan(precision: Precision, micro_batches: Vec<MicroBatch>, step: usize) -> StepPlan {
    let targets: usize = micro_batches.iter().map(|batch| batch.targets.len()).sum();
    StepPlan {
        step: step as u64,
        updates: step as u64,
        learning_rate: 1e-4,
        loss_scale: match precision {
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
