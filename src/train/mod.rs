//! `mp-train train`: fetch, forward and backward, agree, update, report, save.

mod batches;
mod checkpoint;
mod error;
mod initial;
mod validation;
mod writer;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::config::run::{AdapterSection, LossNormalisation, Precision, Resume, RunConfig};
use crate::data::DataError;
use crate::data::batch::MicroBatch;
use crate::data::cache::{Phase, Progress};
use crate::data::rows::Rows;
use crate::data::sampler::SamplerState;
use crate::model::weights;
use crate::optim::curve::learning_rate;
use crate::optim::loss_scale::LossScale;
use crate::pipeline::base::{Base, Layout, StartError, check_devices};
use crate::pipeline::launch::Engine;
use crate::pipeline::messages::{StepOutcome, StepPlan};
use crate::pipeline::prepare::Prepared;
use crate::pipeline::rehearsal::Rehearsal;
use crate::report::{
    Event, MemoryReport, RunFinished, RunStarted, StageMemory, StageSummary, StepReport,
    TokenisingReport,
};

use self::batches::{Batches, StepBatches};
use self::checkpoint::{Fingerprint, Run, TrainerState};
pub use self::error::TrainError;
use self::writer::Writer;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done and the result is saved.
    Finished,
    /// A signal came while model and data were opened; nothing was trained.
    InterruptedBeforeStart,
    /// A signal came; a checkpoint of this step is saved.
    Interrupted {
        /// Steps done.
        step: u64,
    },
}

/// Trains, from the start or from a checkpoint, and says what happens through `reporter`.
///
/// # Errors
/// Configuration, model or data that the user can mend; a stage that failed; training that diverged.
/// Checkpoints written before stay valid.
pub fn run(
    config: &RunConfig,
    reporter: &mut dyn FnMut(Event),
    stop: &AtomicBool,
) -> Result<Outcome, TrainError> {
    let started = Instant::now();
    let pipeline = &config.pipeline;
    check_devices(
        &pipeline.devices,
        config.model.precision,
        pipeline.transport,
    )?;
    let resumed = checkpoint::find(config, reporter)?;
    let position = resumed.as_ref().map(|state| state.trainer.data);
    let Some(prepared) = open(config, position.unwrap_or_default(), reporter, stop)? else {
        return Ok(Outcome::InterruptedBeforeStart);
    };
    let fingerprint = Fingerprint::of(&prepared.rows);
    let mut state = match &resumed {
        Some(resumed) => {
            resumed.check(config, &fingerprint)?;
            resumed.trainer.clone()
        }
        None => TrainerState::new(loss_scale(config), fingerprint),
    };
    let Prepared {
        base,
        rows,
        validation,
        trainables,
        layout,
        sampler,
        max_steps,
        template,
        warnings,
        ..
    } = prepared;
    for warning in warnings {
        reporter(Event::Warning(warning));
    }
    let initial = initial::values(config, &trainables, resumed)?;
    let mut engine = base.start(&layout, trainables.clone(), initial)?;
    // Memory on the CPU is not taken ahead but page by page, and what there is of it changes under a run: a
    // rehearsal would cost a step and promise nothing.
    if layout.is_reserved() {
        rehearse(config, &base, &layout, &state, &mut engine)?;
    }
    let config_path = checkpoint::write_config(config, &config.run.output)?;
    reporter(Event::RunStarted(RunStarted {
        stages: summary(&layout),
        transport: engine.transport().to_owned(),
        trainable_parameters: trainables.count() as u64,
        model_parameters: model_parameters(&base),
        start_step: state.step,
        max_steps,
        output: config.run.output.clone(),
        config_path,
    }));

    let this = Run {
        config,
        trainables: &trainables,
        base: &base,
        template: template.as_ref(),
    };
    let steps = max_steps.saturating_sub(state.step);
    let training = Training {
        run: this,
        validation: validation.as_ref(),
        layout: &layout,
        max_steps,
    };
    // Data ahead of the steps and checkpoints behind them; both threads end with this.
    let trained = std::thread::scope(|threads| {
        let batches = Batches::start(threads, config, &rows, sampler, steps);
        let mut writer = Writer::start(threads, move |state, parameters| {
            checkpoint::save(this, state, parameters)
        });
        let trained = training.steps(
            &mut engine,
            &mut state,
            batches,
            &mut writer,
            reporter,
            stop,
        );
        writer.close(trained, reporter)
    })?;
    let result = match trained {
        Trained::Interrupted => None,
        Trained::Finished => Some(checkpoint::write_result(this, &engine.snapshot()?)?),
    };
    report_memory(&layout, &mut engine, state.step, reporter)?;
    let Some(result) = result else {
        return Ok(Outcome::Interrupted { step: state.step });
    };
    reporter(Event::Finished(RunFinished {
        steps: state.step,
        seconds: started.elapsed().as_secs_f64(),
        result,
    }));
    Ok(Outcome::Finished)
}

/// How the steps of a run ended.
enum Trained {
    /// All are done.
    Finished,
    /// A signal came.
    Interrupted,
}

/// What stays the same over the steps of a run.
struct Training<'a> {
    run: Run<'a>,
    validation: Option<&'a Rows>,
    layout: &'a Layout,
    max_steps: u64,
}

impl Training<'_> {
    /// Fetch, step, report, save, until all is done or a signal comes.
    fn steps(
        &self,
        engine: &mut Engine,
        state: &mut TrainerState,
        mut batches: Batches<'_>,
        writer: &mut Writer<'_>,
        reporter: &mut dyn FnMut(Event),
        stop: &AtomicBool,
    ) -> Result<Trained, TrainError> {
        let Run { config, .. } = self.run;
        let max_steps = self.max_steps;
        let mut saved = resumed_step(config, state.step);
        loop {
            let began = Instant::now();
            let Some(fetched) = batches.next() else {
                break;
            };
            let after = fetched.after;
            let plan = plan(config, max_steps, fetched, state);
            let outcome = engine.step(plan.clone())?;
            state.advance(&outcome, after);
            reporter(Event::Step(report(max_steps, &plan, &outcome, began)));
            writer.poll(reporter)?;
            if state.loss_scale.skipped_in_a_row() >= config.optimizer.max_skipped_steps {
                let batch = checkpoint::write_diverged_batch(&config.run.output, &plan)?;
                return Err(TrainError::Diverged {
                    step: state.step,
                    skipped: state.loss_scale.skipped_in_a_row(),
                    batch,
                });
            }
            let eval_steps = config.run.eval_steps;
            let measured =
                state.step == max_steps || eval_steps > 0 && state.step.is_multiple_of(eval_steps);
            if let Some(rows) = self.validation.filter(|_| measured) {
                let (tokens, sequences) = (self.layout.max_rows, self.layout.max_sequences);
                let report = validation::measure(engine, rows, tokens, sequences, state.step)?;
                reporter(Event::Validation(report));
            }
            let interrupted = stop.load(Ordering::Relaxed);
            let due = config.run.save_steps > 0 && state.step.is_multiple_of(config.run.save_steps);
            if due || interrupted {
                writer.save(state, reporter, || Ok(engine.snapshot()?))?;
                saved = Some(state.step);
            }
            if interrupted {
                return Ok(Trained::Interrupted);
            }
        }
        if saved != Some(state.step) {
            writer.save(state, reporter, || Ok(engine.snapshot()?))?;
        }
        Ok(Trained::Finished)
    }
}

/// Forward and backward of the largest micro-batches before the first step.
fn rehearse(
    config: &RunConfig,
    base: &Base,
    layout: &Layout,
    state: &TrainerState,
    engine: &mut Engine,
) -> Result<(), TrainError> {
    let scale = state.loss_scale.scale();
    let rehearsal = Rehearsal::of(layout, &base.config, &config.optimizer, scale);
    Ok(engine.rehearse(rehearsal.map_err(StartError::Schedule)?)?)
}

/// Says how the memory that was planned was used, where it was taken ahead.
fn report_memory(
    layout: &Layout,
    engine: &mut Engine,
    step: u64,
    reporter: &mut dyn FnMut(Event),
) -> Result<(), TrainError> {
    let stages = layout.devices.iter().zip(engine.memory()?);
    let stages: Vec<StageMemory> = stages
        .filter_map(|(device, memory)| {
            let memory = memory?;
            Some(StageMemory {
                device: device.to_string(),
                planned_bytes: memory.planned,
                used_bytes: memory.used,
                beside_bytes: memory.beside,
            })
        })
        .collect();
    if !stages.is_empty() {
        reporter(Event::Memory(MemoryReport { step, stages }));
    }
    Ok(())
}

/// The step that a run would go on from, checked as the run itself does.
///
/// # Errors
/// There is no checkpoint, it is damaged, or it is that of another run or of other rows.
pub fn check_resume(
    config: &RunConfig,
    rows: &Rows,
    warn: &mut dyn FnMut(String),
) -> Result<u64, TrainError> {
    let mut reporter = |event: Event| {
        if let Event::Warning(warning) = event {
            warn(warning);
        }
    };
    match checkpoint::find(config, &mut reporter)? {
        Some(resumed) => {
            resumed.check(config, &Fingerprint::of(rows))?;
            Ok(resumed.trainer.step)
        }
        None => Ok(0),
    }
}

/// Opens model and data, saying how far the data is; `None` when a signal came meanwhile.
fn open(
    config: &RunConfig,
    position: SamplerState,
    reporter: &mut dyn FnMut(Event),
    stop: &AtomicBool,
) -> Result<Option<Prepared>, TrainError> {
    let mut tell = |progress: Progress| {
        if progress.phase == Phase::Tokenising {
            reporter(Event::Tokenising(tokenising(&progress)));
        }
        match stop.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    };
    match Prepared::open(config, position, &mut tell) {
        Err(StartError::Data(DataError::Interrupted)) => Ok(None),
        prepared => Ok(Some(prepared?)),
    }
}

fn tokenising(progress: &Progress) -> TokenisingReport {
    TokenisingReport {
        bytes: progress.bytes_done,
        total_bytes: progress.bytes_total,
        rows: progress.rows,
        tokens: progress.tokens,
        seconds: progress.elapsed.as_secs_f64(),
        done: progress.finished,
    }
}

/// The step that a resumed run finds saved already, in its own output folder.
fn resumed_step(config: &RunConfig, step: u64) -> Option<u64> {
    (config.run.resume == Resume::Latest).then_some(step)
}

fn loss_scale(config: &RunConfig) -> LossScale {
    match config.model.precision {
        Precision::F32 => LossScale::fixed(),
        Precision::F16 => LossScale::dynamic(config.optimizer.initial_loss_scale),
    }
}

fn summary(layout: &Layout) -> Vec<StageSummary> {
    let stages = layout.devices.iter().zip(&layout.stages);
    let summary = stages.map(|(device, stage)| StageSummary {
        device: device.to_string(),
        blocks: stage.chunks.clone(),
    });
    summary.collect()
}

fn model_parameters(base: &Base) -> u64 {
    let tied = base.head_source.tied;
    let tensors = weights::own_tensors(&base.config, tied).into_iter();
    tensors
        .map(|(_, shape)| shape.iter().product::<usize>() as u64)
        .sum()
}

/// What the stages do with the micro-batches of a step.
fn plan(
    config: &RunConfig,
    max_steps: u64,
    batches: StepBatches,
    state: &TrainerState,
) -> StepPlan {
    StepPlan {
        step: state.step,
        updates: state.updates,
        learning_rate: learning_rate(&config.optimizer, state.updates, max_steps),
        loss_scale: state.loss_scale.scale(),
        target_weights: batches.target_weights,
        micro_batches: batches.micro_batches,
        optimizer: config.optimizer.clone(),
        seed: config.run.seed,
    }
}

/// Weight of one target of each micro-batch in the loss of the step.
pub fn target_weights(normalisation: LossNormalisation, micro_batches: &[MicroBatch]) -> Vec<f32> {
    let targets = |batch: &MicroBatch| batch.targets.len() as f64;
    let all: f64 = micro_batches.iter().map(targets).sum();
    let count = micro_batches.len() as f64;
    let weight = |batch: &MicroBatch| match normalisation {
        LossNormalisation::PerToken => (1.0 / all) as f32,
        LossNormalisation::PerMicroBatch => (1.0 / (targets(batch) * count)) as f32,
    };
    micro_batches.iter().map(weight).collect()
}

fn report(max_steps: u64, plan: &StepPlan, outcome: &StepOutcome, began: Instant) -> StepReport {
    let sums = outcome.loss_sums.iter().zip(&plan.micro_batches);
    let micro_losses: Vec<f32> = sums
        .map(|(sum, batch)| sum / batch.targets.len() as f32)
        .collect();
    let weighted = outcome.loss_sums.iter().zip(&plan.target_weights);
    let loss: f64 = weighted
        .map(|(&sum, &weight)| f64::from(sum) * f64::from(weight))
        .sum();
    let batches = plan.micro_batches.iter();
    StepReport {
        step: plan.step + 1,
        max_steps,
        loss: loss as f32,
        micro_losses,
        learning_rate: plan.learning_rate,
        grad_norm: outcome.grad_norm,
        clipped: outcome.applied && outcome.clip < 1.0,
        skipped: !outcome.applied,
        loss_scale: plan.loss_scale,
        target_tokens: batches
            .clone()
            .map(|batch| batch.targets.len() as u64)
            .sum(),
        tokens: batches.map(|batch| batch.tokens() as u64).sum(),
        seconds: began.elapsed().as_secs_f64(),
    }
}

/// Where the result of a run of this kind goes, inside its output folder.
fn result_folder(adapter: &AdapterSection, output: &Path) -> PathBuf {
    output.join(match adapter {
        AdapterSection::Lora(_) | AdapterSection::Prefix(_) => "adapter",
        AdapterSection::Full(_) => "model",
    })
}
