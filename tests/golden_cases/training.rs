//! Optimiser steps through the pipeline: near the reference, and the same bits however it is laid out.

use std::sync::Arc;

use mp_train::adapter::{ParameterState, files};
use mp_train::config::run::{
    Device, LossNormalisation, LrSchedule, OptimizerSection, Precision, Recompute, ScheduleKind,
};
use mp_train::data::batch::MicroBatch;
use mp_train::optim::curve::learning_rate;
use mp_train::pipeline::messages::StepPlan;
use mp_train::train::target_weights;

use super::adapter::Adapter;
use super::batch::{Padding, Stored};
use super::case::{Case, Family};
use super::compare::{Found, FoundTensors, Report};
use super::engine::{self, Configuration, Room, Values};
use super::single::Parts;
use super::{Golden, Outcome, gradients};

/// From the LoRA of a PEFT folder.
pub fn lora<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::lora(case.folder()?)?;
    train::<B>(&Parts::new(family, &adapter), case, report)
}

/// From the prefix of a THUDM folder.
pub fn prefix<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::prefix(case.folder()?)?;
    train::<B>(&Parts::new(family, &adapter), case, report)
}

/// Every parameter, embedding and head apart.
pub fn full<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::full(&family.model, &family.head_source);
    train::<B>(&Parts::new(family, &adapter), case, report)
}

/// Every parameter, embedding and head being one: a gradient first, then steps.
pub fn tied<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    gradients::tied::<B>(family, case, report)?;
    let head_source = family.tied_to_embedding();
    let adapter = Adapter::full(&family.model, &head_source);
    let parts = Parts {
        head_source,
        ..Parts::new(family, &adapter)
    };
    train::<B>(&parts, case, report)
}

fn train<B: Golden>(parts: &Parts<'_>, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let mut unpadded = None;
    for &padding in paddings::<B>() {
        let job = Job::new(parts, case, padding)?;
        let run = job.run::<B>(Configuration::PLAIN, None, job.steps.len())?;
        let variant = format!("train/{}", padding.name());
        report.compare(case, &variant, &job.found(&run)?)?;
        unpadded = Some((job, run));
    }
    let (job, run) = unpadded.ok_or("no run")?;
    let layouts = Layouts::of::<B>(&job);
    let reference = match layouts.steps == job.steps.len() {
        true => run,
        false => job.run::<B>(Configuration::PLAIN, None, layouts.steps)?,
    };
    let counts = engine::stage_counts::<B>(parts.family.config.num_layers);
    for stages in counts.clone() {
        for &schedule in layouts.schedules {
            let layout = Configuration {
                stages,
                schedule,
                ..Configuration::PLAIN
            };
            if !layout.is_possible(parts.family.config.num_layers, job.room.micro_batches) {
                continue;
            }
            let mut differs = None;
            for configuration in layouts.configurations(stages, schedule) {
                let run = job.run::<B>(configuration, None, layouts.steps)?;
                let difference = run.difference(&reference);
                differs = differs.or(difference.map(|what| format!("{configuration:?}: {what}")));
            }
            report.same(&format!("bits/{stages}_stages/{}", name(schedule)), differs);
        }
    }
    for stages in counts.clone() {
        let other = stages % counts.end() + 1;
        let half = layouts.steps / 2;
        let on = |stages| Configuration {
            stages,
            threads: 2,
            ..Configuration::PLAIN
        };
        let mut run = job.run::<B>(on(stages), None, half)?;
        run.then(job.run::<B>(on(other), Some((half, &run.states)), layouts.steps)?);
        let variant = format!("bits/{stages}_then_{other}_stages");
        report.same(&variant, run.difference(&reference));
    }
    Ok(())
}

/// Steps on each of some bases that must be the same, on one stage and on three: the same bits.
pub fn same_on_all<B: Golden>(
    bases: &[(&str, Parts<'_>)],
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    // Emulated GPUs are slow.
    let steps = match B::DEVICE {
        Device::Cpu => 3,
        Device::Cuda(_) => 2,
    };
    let on = |stages: usize, recompute| Configuration {
        stages,
        recompute,
        ..Configuration::PLAIN
    };
    let mut reference: Option<Run> = None;
    for (name, parts) in bases {
        let job = Job::new(parts, case, Padding::Removed)?;
        let stages = 3.min(parts.family.config.num_layers);
        for configuration in [on(1, Recompute::None), on(stages, Recompute::Block)] {
            let run = job.run::<B>(configuration, None, steps)?;
            let differs = reference
                .as_ref()
                .and_then(|reference| run.difference(reference));
            let stages = configuration.stages;
            report.same(&format!("bits/{}/{name}/{stages}", case.name), differs);
            reference.get_or_insert(run);
        }
    }
    Ok(())
}

/// What is done with padding. Emulated GPUs are slow: they train without any, as the program does, and
/// see it where a single step is compared.
fn paddings<B: Golden>() -> &'static [Padding] {
    match B::DEVICE {
        Device::Cpu => &Padding::BOTH,
        Device::Cuda(_) => &[Padding::Removed],
    }
}

fn name(schedule: ScheduleKind) -> &'static str {
    match schedule {
        ScheduleKind::OneForwardOneBackward => "1f1b",
        ScheduleKind::Gpipe => "gpipe",
        ScheduleKind::Interleaved => "interleaved",
    }
}

/// The layouts that must give the same bits, and over how many steps.
struct Layouts {
    steps: usize,
    schedules: &'static [ScheduleKind],
    threads: std::ops::RangeInclusive<usize>,
}

impl Layouts {
    /// Every schedule, recomputation and number of threads in f32, over all steps; in f16 every
    /// recomputation, over the steps that it takes to have moments to go on from.
    fn of<B: Golden>(job: &Job<'_>) -> Layouts {
        match B::PRECISION {
            Precision::F32 => Layouts {
                steps: job.steps.len(),
                schedules: &[
                    ScheduleKind::OneForwardOneBackward,
                    ScheduleKind::Gpipe,
                    ScheduleKind::Interleaved,
                ],
                threads: 1..=3,
            },
            Precision::F16 => Layouts {
                steps: job.steps.len().min(3),
                schedules: &[
                    ScheduleKind::OneForwardOneBackward,
                    ScheduleKind::Interleaved,
                ],
                threads: 2..=2,
            },
        }
    }

    fn configurations(
        &self,
        stages: usize,
        schedule: ScheduleKind,
    ) -> impl Iterator<Item = Configuration> {
        let recompute = [Recompute::None, Recompute::AttentionFree, Recompute::Block];
        let threads = self.threads.clone();
        recompute.into_iter().flat_map(move |recompute| {
            threads.clone().map(move |threads| Configuration {
                stages,
                schedule,
                recompute,
                threads,
            })
        })
    }
}

/// A training run of the reference.
struct Job<'a> {
    parts: &'a Parts<'a>,
    optimizer: OptimizerSection,
    total_steps: u64,
    /// The micro-batches of each step.
    steps: Vec<Vec<MicroBatch>>,
    room: Room,
}

/// What a run left.
struct Run {
    learning_rates: Vec<f64>,
    /// For each step the mean loss of each micro-batch.
    micro_losses: Vec<Vec<f32>>,
    losses: Vec<f32>,
    grad_norms: Vec<f32>,
    states: Vec<ParameterState>,
}

impl<'a> Job<'a> {
    fn new(parts: &'a Parts<'a>, case: &Case, padding: Padding) -> Outcome<Job<'a>> {
        let (shape, ids) = case.input("train.input_ids")?;
        let (_, labels) = case.input("train.labels")?;
        let [entries, rows, seq] = shape[..] else {
            return Err(format!("train.input_ids of shape {shape:?}").into());
        };
        let entry = |entry: usize| {
            let cells = entry * rows * seq..(entry + 1) * rows * seq;
            let stored = Stored::new(&[rows, seq], &ids[cells.clone()], Some(&labels[cells]))?;
            Ok(stored.right_padded(parts.family, padding)?.micro)
        };
        let entries: Vec<MicroBatch> = (0..entries).map(entry).collect::<Outcome<_>>()?;
        let (shape, index) = case.input("train.micro_index")?;
        let accumulation: usize = case.hyper("gradient_accumulation")?;
        if shape != [case.hyper("steps")?, accumulation] {
            return Err(format!("train.micro_index of shape {shape:?}").into());
        }
        let step = |step: &[i64]| {
            let chosen = step
                .iter()
                .map(|&index| entries.get(usize::try_from(index).ok()?));
            chosen.map(|entry| entry.cloned()).collect::<Option<_>>()
        };
        let steps = index
            .chunks_exact(accumulation)
            .map(step)
            .collect::<Option<_>>();
        let [beta1, beta2] = case.hyper("betas")?;
        Ok(Job {
            parts,
            optimizer: OptimizerSection {
                learning_rate: case.hyper("lr")?,
                lr_schedule: lr_schedule(&case.hyper::<String>("schedule")?)?,
                warmup_steps: case.hyper("warmup_steps")?,
                weight_decay: case.hyper("weight_decay")?,
                beta1,
                beta2,
                eps: case.hyper("eps")?,
                max_grad_norm: case.hyper("max_grad_norm")?,
                loss_normalisation: LossNormalisation::PerMicroBatch,
                initial_loss_scale: 65_536.0,
                max_skipped_steps: 1,
            },
            total_steps: case.hyper("total_steps")?,
            steps: steps.ok_or("train.micro_index points outside")?,
            room: Room {
                rows: entries.iter().map(MicroBatch::tokens).max().unwrap_or(0),
                sequences: rows,
                micro_batches: accumulation,
            },
        })
    }

    /// Steps up to `end`: from the start, or from the state that a run had left before some step.
    fn run<B: Golden>(
        &self,
        configuration: Configuration,
        from: Option<(usize, &[ParameterState])>,
        end: usize,
    ) -> Outcome<Run> {
        let begin = from.map_or(0, |(step, _)| step);
        let values = self.values(from.map(|(_, states)| states))?;
        let mut engine = engine::start::<B>(self.parts, configuration, self.room, values)?;
        let mut run = Run {
            learning_rates: Vec::new(),
            micro_losses: Vec::new(),
            losses: Vec::new(),
            grad_norms: Vec::new(),
            states: Vec::new(),
        };
        let normalisation = self.optimizer.loss_normalisation;
        for (step, micro_batches) in self.steps.iter().enumerate().take(end).skip(begin) {
            let rate = learning_rate(&self.optimizer, step as u64, self.total_steps);
            let weights = target_weights(normalisation, micro_batches);
            let outcome = engine.step(StepPlan {
                step: step as u64,
                updates: step as u64,
                learning_rate: rate,
                loss_scale: B::loss_scale(),
                micro_batches: micro_batches.clone(),
                target_weights: weights.clone(),
                optimizer: self.optimizer.clone(),
                seed: 0,
            })?;
            if !outcome.applied {
                return Err(format!("step {step} was skipped").into());
            }
            let sums = outcome.loss_sums.iter();
            let batches = sums.clone().zip(micro_batches);
            let means = batches.map(|(sum, batch)| sum / batch.targets.len() as f32);
            run.micro_losses.push(means.collect());
            let weighted = sums.zip(weights).map(|(&sum, weight)| sum * weight);
            run.losses.push(weighted.sum());
            run.grad_norms.push(outcome.grad_norm);
            run.learning_rates.push(rate);
        }
        run.states = engine.snapshot()?;
        Ok(run)
    }

    /// Values from the adapter's files, or values and moments from a snapshot.
    fn values(&self, states: Option<&[ParameterState]>) -> Outcome<Values> {
        let adapter = self.parts.adapter.clone();
        let Some(states) = states.map(<[_]>::to_vec) else {
            return Ok(Arc::new(move |spec| adapter.initial(spec)));
        };
        let tied = self.parts.head_source.tied;
        let trainables = adapter.trainables(&self.parts.family.config, tied)?;
        Ok(Arc::new(move |spec| {
            let start = spec.slice.map(|slice| slice.start);
            let (index, _) = trainables.find(&spec.name, start).unwrap();
            Ok(states[index].clone())
        }))
    }

    fn found(&self, run: &Run) -> Outcome<FoundTensors> {
        let (steps, micro_batches) = (self.steps.len(), self.room.micro_batches);
        let mut found = FoundTensors::from([
            (
                "train.lr".into(),
                Found::whole([steps], &run.learning_rates),
            ),
            (
                "train.micro_loss".into(),
                Found::whole([steps, micro_batches], &run.micro_losses.concat()),
            ),
            ("train.loss".into(), Found::whole([steps], &run.losses)),
            (
                "train.grad_norm".into(),
                Found::whole([steps], &run.grad_norms),
            ),
        ]);
        let (config, tied) = (&self.parts.family.config, self.parts.head_source.tied);
        let trainables = self.parts.adapter.trainables(config, tied)?;
        let values = run.states.iter().map(|state| &state.values[..]);
        for (name, tensor) in files::put_together(trainables.specs(), values)? {
            let whole = Found::whole(tensor.shape.clone(), &tensor.to_f32()?);
            found.insert(format!("final.{name}"), whole);
        }
        Ok(found)
    }
}

impl Run {
    /// Goes on with what a later run did.
    fn then(&mut self, later: Run) {
        self.learning_rates.extend(later.learning_rates);
        self.micro_losses.extend(later.micro_losses);
        self.losses.extend(later.losses);
        self.grad_norms.extend(later.grad_norms);
        self.states = later.states;
    }

    /// The first thing that is not the same, bit for bit.
    fn difference(&self, other: &Run) -> Option<String> {
        let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
        let first = |a: &[f32], b: &[f32]| {
            let (a, b) = (bits(a), bits(b));
            match a.len() == b.len() {
                true => a.iter().zip(&b).position(|(a, b)| a != b),
                false => Some(a.len().min(b.len())),
            }
        };
        let series = [
            (
                "micro loss",
                self.micro_losses.concat(),
                other.micro_losses.concat(),
            ),
            ("loss", self.losses.clone(), other.losses.clone()),
            (
                "grad norm",
                self.grad_norms.clone(),
                other.grad_norms.clone(),
            ),
        ];
        for (what, a, b) in series {
            if let Some(index) = first(&a, &b) {
                return Some(format!("{what} {index}"));
            }
        }
        if self.states.len() != other.states.len() {
            return Some("number of parameters".to_owned());
        }
        for (index, (a, b)) in self.states.iter().zip(&other.states).enumerate() {
            let parts = [
                (&a.values, &b.values),
                (&a.exp_avg, &b.exp_avg),
                (&a.exp_avg_sq, &b.exp_avg_sq),
            ];
            if parts.iter().any(|(a, b)| first(a, b).is_some()) {
                return Some(format!("parameter {index}"));
            }
        }
        None
    }
}

/// From the manifest's words for it.
fn lr_schedule(words: &str) -> Outcome<LrSchedule> {
    match words {
        "linear warmup then cosine to 0" => Ok(LrSchedule::Cosine),
        "linear warmup then linear to 0" => Ok(LrSchedule::Linear),
        "linear warmup then constant" => Ok(LrSchedule::Constant),
        words => Err(format!("the schedule `{words}` is not known").into()),
    }
}
