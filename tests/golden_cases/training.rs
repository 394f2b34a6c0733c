//! Optimiser steps through the pipeline: near the reference, and the same bits however it is laid out.

use std::collections::BTreeMap;
use std::sync::Arc;

use mp_train::adapter::{ParameterState, files};
use mp_train::backend::cpu::Cpu;
use mp_train::checkpoint::HostTensor;
use mp_train::config::run::{Device, Precision, Recompute, ScheduleKind};
use mp_train::data::batch::MicroBatch;
use mp_train::model::trainables::Trainables;
use mp_train::optim::curve::learning_rate;
use mp_train::pipeline::messages::StepPlan;
use mp_train::train::target_weights;

use super::batch::{Padding, Stored};
use super::case::Case;
use super::compare::{Found, FoundTensors, Report};
use super::engine::{self, Configuration, Room, Values};
use super::limits::Kind;
use super::series::{self, Series};
use super::single::Parts;
use super::{Golden, Outcome, trained};

/// Every run of steps that a case stores.
pub fn train<B: Golden>(parts: &Parts<'_>, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    for series in series::of_case(case)? {
        run_series::<B>(parts, case, &series, report)?;
    }
    Ok(())
}

fn run_series<B: Golden>(
    parts: &Parts<'_>,
    case: &Case,
    series: &Series,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let lead = series.lead;
    let mut unpadded = None;
    for &padding in paddings::<B>() {
        let job = Job::new(parts, case, series, padding)?;
        let run = job.run::<B>(Configuration::PLAIN, None, job.steps.len())?;
        let compared = match B::PRECISION == Precision::F16 && amplifies(case, lead) {
            true => job.along::<B>()?,
            false => run.clone(),
        };
        let variant = format!("{lead}/{}", padding.name());
        report.compare(case, &variant, &job.found(case, lead, &compared)?)?;
        if lead == "train" && case.expects("forward_loss_after") {
            let adapter = parts.adapter.with_values(job.final_values(&compared)?);
            let variant = format!("{variant}/loss_after");
            trained::loss_after::<B>(parts.family, case, &adapter, &variant, report)?;
        }
        unpadded = Some((job, run));
    }
    let (job, run) = unpadded.ok_or("no run")?;
    // Emulated GPUs are slow, and one run of a case shows how they are laid out.
    if B::DEVICE != Device::Cpu && !series.laid_out {
        return Ok(());
    }
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
            report.same(
                &format!("{lead}/bits/{stages}_stages/{}", name(schedule)),
                differs,
            );
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
        let variant = format!("{lead}/bits/{stages}_then_{other}_stages");
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
    let series = &series::of_case(case)?[0];
    for (name, parts) in bases {
        let job = Job::new(parts, case, series, Padding::Removed)?;
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
    series: &'a Series,
    /// The micro-batches of each step.
    steps: Vec<Vec<MicroBatch>>,
    room: Room,
}

/// Whether rounding grows in a run: even in float32 the trained weights end further from float64 than
/// weights may be off. Half precision then goes another way within some steps.
fn amplifies(case: &Case, lead: &str) -> bool {
    let mut trained = case.expected_names();
    let weights = trained.find(|name| name.starts_with(&format!("{lead}.final.")));
    let gap = weights.and_then(|name| case.float64_gap(name));
    let limit = Kind::FinalWeights.limit(Precision::F32, case.form);
    gap.is_some_and(|gap| gap > limit.value())
}

/// What a run left.
#[derive(Clone, Default)]
struct Run {
    learning_rates: Vec<f64>,
    /// For each step the mean loss of each micro-batch.
    micro_losses: Vec<Vec<f32>>,
    losses: Vec<f32>,
    grad_norms: Vec<f32>,
    states: Vec<ParameterState>,
}

impl<'a> Job<'a> {
    fn new(
        parts: &'a Parts<'a>,
        case: &Case,
        series: &'a Series,
        padding: Padding,
    ) -> Outcome<Job<'a>> {
        let (shape, ids) = case.input("train.input_ids")?;
        let (_, labels) = case.input("train.labels")?;
        let mask = case.input_if_any("train.attention_mask")?;
        let [entries, rows, seq] = shape[..] else {
            return Err(format!("train.input_ids of shape {shape:?}").into());
        };
        let entry = |entry: usize| {
            let cells = entry * rows * seq..(entry + 1) * rows * seq;
            let stored = Stored::new(
                &[rows, seq],
                &ids[cells.clone()],
                Some(&labels[cells.clone()]),
            )?;
            let stored = match &mask {
                Some((_, mask)) => stored.with_mask(&mask[cells])?,
                None => stored,
            };
            Ok(stored.right_padded(parts.family, padding)?.micro)
        };
        let entries: Vec<MicroBatch> = (0..entries).map(entry).collect::<Outcome<_>>()?;
        let step = |step: &Vec<usize>| {
            let chosen = step.iter().map(|&index| entries.get(index).cloned());
            chosen.collect::<Option<_>>()
        };
        let steps = series.index.iter().map(step).collect::<Option<_>>();
        let accumulation = series.index.first().ok_or("no step")?.len();
        Ok(Job {
            parts,
            series,
            steps: steps.ok_or("a step takes a micro-batch that is not there")?,
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
        let trainables = self.trainables()?;
        let parts = self.parts;
        let mut engine =
            engine::start_training::<B>(parts, configuration, self.room, trainables, values)?;
        let mut run = Run::default();
        let optimizer = &self.series.optimizer;
        let normalisation = optimizer.loss_normalisation;
        for (step, micro_batches) in self.steps.iter().enumerate().take(end).skip(begin) {
            let rate = learning_rate(optimizer, step as u64, self.series.total_steps);
            let weights = target_weights(normalisation, micro_batches);
            let outcome = engine.step(StepPlan {
                step: step as u64,
                updates: step as u64,
                learning_rate: rate,
                loss_scale: B::loss_scale(),
                micro_batches: micro_batches.clone(),
                target_weights: weights.clone(),
                optimizer: optimizer.clone(),
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

    /// Every step of the run, each from the weights and moments that f32 has come to by then: as the
    /// reference's tokens are fed to a generation in f16.
    fn along<B: Golden>(&self) -> Outcome<Run> {
        let (mut run, mut before) = (Run::default(), Vec::new());
        for step in 0..self.steps.len() {
            let from = (step > 0).then_some((step, &before[..]));
            run.then(self.run::<B>(Configuration::PLAIN, from, step + 1)?);
            before = self
                .run::<Cpu<f32>>(Configuration::PLAIN, from, step + 1)?
                .states;
        }
        Ok(run)
    }

    /// Values from the adapter's files, or values and moments from a snapshot.
    fn values(&self, states: Option<&[ParameterState]>) -> Outcome<Values> {
        let adapter = self.parts.adapter.clone();
        let Some(states) = states.map(<[_]>::to_vec) else {
            return Ok(Arc::new(move |spec| adapter.initial(spec)));
        };
        let trainables = self.trainables()?;
        Ok(Arc::new(move |spec| {
            let start = spec.slice.map(|slice| slice.start);
            let (index, _) = trainables.find(&spec.name, start).unwrap();
            Ok(states[index].clone())
        }))
    }

    /// What the run trains.
    fn trainables(&self) -> Outcome<Trainables> {
        let (config, tied) = (&self.parts.config, self.parts.head_source.tied);
        let trainables = self.parts.adapter.trainables(config, tied)?;
        Ok(match self.series.one_group {
            true => trainables.in_one_group(),
            false => trainables,
        })
    }

    /// The trained tensors by name, parts put together.
    fn final_values(&self, run: &Run) -> Outcome<BTreeMap<String, HostTensor>> {
        let values = run.states.iter().map(|state| &state.values[..]);
        Ok(files::put_together(self.trainables()?.specs(), values)?)
    }

    fn found(&self, case: &Case, lead: &str, run: &Run) -> Outcome<FoundTensors> {
        let (steps, micro_batches) = (self.steps.len(), self.room.micro_batches);
        let total = self.series.total_steps;
        let rate_after = |step| learning_rate(&self.series.optimizer, step, total);
        let rates_after: Vec<f64> = (1..=steps as u64).map(rate_after).collect();
        let named = |name: &str, tensor| (format!("{lead}.{name}"), tensor);
        let mut found = FoundTensors::from([
            named("lr", Found::whole([steps], &run.learning_rates)),
            named(
                "lr_reported_after_step",
                Found::whole([steps], &rates_after),
            ),
            named(
                "micro_loss",
                Found::whole([steps, micro_batches], &run.micro_losses.concat()),
            ),
            named("loss", Found::whole([steps], &run.losses)),
            named("grad_norm", Found::whole([steps], &run.grad_norms)),
        ]);
        for (name, tensor) in self.final_values(run)? {
            let mut whole = Found::whole(tensor.shape.clone(), &tensor.to_f32()?);
            if let Some(live) = live_entries(case, &name)? {
                whole.keep(&live)?;
            }
            found.insert(format!("{lead}.final.{name}"), whole);
        }
        Ok(found)
    }
}

/// Which entries of a bias can change a result, where a case says so (`k_proj_bias_is_live`): the
/// gradient of the others is rounding noise, of which AdamW makes whole steps.
fn live_entries(case: &Case, tensor: &str) -> Outcome<Option<Vec<bool>>> {
    for input in case.inputs_under("") {
        let module = input.strip_suffix("_bias_is_live");
        if module.is_some_and(|module| tensor.ends_with(&format!(".{module}.bias"))) {
            let (_, live) = case.input(input)?;
            return Ok(Some(live.iter().map(|&entry| entry == 1).collect()));
        }
    }
    Ok(None)
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
