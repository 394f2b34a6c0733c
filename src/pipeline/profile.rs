//! Where a measured step spent its time: a record per stage of what it did when, on one clock.

use std::time::Instant;

use serde::Serialize;

use super::engine::Engine;
use super::failure::{Cause, Failure};
use super::messages::{Command, Reply, StepOutcome, StepPlan};
use super::schedule::{Action, Flow};
use super::watch::Task;
use crate::backend::Measured;
pub use crate::backend::WorkSeconds;

/// Where one step spent its time, in seconds from the moment the first stage began.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepProfile {
    /// In the order of the stages.
    pub stages: Vec<StageProfile>,
    /// When the last stage was done.
    pub seconds: f64,
}

/// What one stage did in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageProfile {
    /// Everything it did, one after the other and without a gap. On a GPU these are times of its compute
    /// stream.
    pub spans: Vec<ActionSpan>,
    /// The same time by kind of work.
    pub work: WorkSeconds,
}

/// Something that a stage did, from when to when.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ActionSpan {
    /// What it was.
    pub what: SpanKind,
    /// Seconds.
    pub begin: f64,
    /// Seconds.
    pub end: f64,
}

impl ActionSpan {
    /// How long it took.
    pub fn seconds(&self) -> f64 {
        self.end - self.begin
    }
}

/// What a stage is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", content = "of", rename_all = "snake_case")]
pub enum SpanKind {
    /// Computes.
    Run(Action),
    /// Waits for the input of an action of this flow, or for a turn to compute.
    Wait(Flow),
    /// Gives what it made to another stage, or waits until there is room for it.
    Exchange(Flow),
    /// Clears gradients, lays a micro-batch out: what an action needs beside its input.
    Prepare,
    /// Ends the step: gradients that stages share, norms, later the optimiser.
    Update,
    /// Agrees with the other stages on norm and losses, and so waits for the slowest of them.
    Agree,
}

impl StageProfile {
    /// Seconds in which it runs actions.
    pub fn busy(&self) -> f64 {
        let runs = self.spans.iter();
        let runs = runs.filter(|span| matches!(span.what, SpanKind::Run(_)));
        runs.map(ActionSpan::seconds).sum()
    }
}

impl StepProfile {
    /// Share of the step in which stage `rank` runs no action, 0 to 1.
    pub fn idle(&self, rank: usize) -> f64 {
        let busy = self.stages.get(rank).map_or(0.0, StageProfile::busy);
        match self.seconds > 0.0 {
            true => (1.0 - busy / self.seconds).clamp(0.0, 1.0),
            false => 0.0,
        }
    }

    /// The measured bubble: share of the time of all stages in which a stage runs no action, 0 to 1.
    pub fn bubble(&self) -> f64 {
        let stages = self.stages.len();
        let idle: f64 = (0..stages).map(|rank| self.idle(rank)).sum();
        idle / stages.max(1) as f64
    }

    /// The records of all stages on one clock.
    fn gather(records: Vec<Record>) -> Self {
        let first = records.iter().map(|record| record.began).min();
        let stage = |record: Record| {
            let since = first.map_or(0.0, |first| (record.began - first).as_secs_f64());
            record.on_clock(since)
        };
        let stages: Vec<_> = records.into_iter().map(stage).collect();
        let ends = stages.iter().filter_map(|stage| stage.spans.last());
        StepProfile {
            seconds: ends.map(|span| span.end).fold(0.0, f64::max),
            stages,
        }
    }
}

/// What a worker noted in a step.
pub(super) struct Record {
    began: Instant,
    /// What it did until each of the stamps.
    kinds: Vec<SpanKind>,
    stamps: Vec<f64>,
    work: WorkSeconds,
}

impl Record {
    /// The stamps that a backend took, one behind each thing done and one before the first.
    pub fn new(kinds: Vec<SpanKind>, measured: Measured) -> Self {
        let Measured {
            began,
            stamps,
            work,
        } = measured;
        debug_assert_eq!(stamps.len(), kinds.len() + 1);
        Record {
            began,
            kinds,
            stamps,
            work,
        }
    }

    /// The profile, when the clock showed `since` as the record began.
    fn on_clock(self, since: f64) -> StageProfile {
        let spans = self.kinds.iter().zip(self.stamps.windows(2));
        let spans = spans.filter_map(|(&what, ends)| match *ends {
            [begin, end] => Some(ActionSpan {
                what,
                begin: since + begin,
                // Clocks of GPUs count in steps of about half a microsecond.
                end: since + end.max(begin),
            }),
            _ => None,
        });
        let spans: Vec<_> = spans.collect();
        let mut work = self.work;
        for span in &spans {
            match span.what {
                SpanKind::Wait(_) | SpanKind::Agree => work.waiting += span.seconds(),
                SpanKind::Exchange(_) => work.communication += span.seconds(),
                SpanKind::Run(_) | SpanKind::Prepare | SpanKind::Update => {}
            }
        }
        let all: f64 = spans.iter().map(ActionSpan::seconds).sum();
        work.other = (all - work.total()).max(0.0);
        StageProfile { spans, work }
    }
}

impl Engine {
    /// Runs one training step on all stages as [`Engine::step`] does, to the same bits, and measures it. On
    /// a GPU that takes a little longer: an event before and one after everything that is queued.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn profile_step(&mut self, plan: StepPlan) -> Result<(StepOutcome, StepProfile), Failure> {
        let plan = std::sync::Arc::new(plan);
        let profiled = self.ask(
            Task::Step(plan.step + 1),
            || Command::Profile(std::sync::Arc::clone(&plan)),
            |reply| match reply {
                Reply::Profile(outcome, record) => Some((outcome, record)),
                _ => None,
            },
        )?;
        let (outcomes, records): (Vec<_>, Vec<_>) = profiled.into_iter().unzip();
        match outcomes.into_iter().next_back() {
            Some(outcome) => Ok((outcome, StepProfile::gather(records))),
            None => Err(self.failure(0, Cause::Vanished)),
        }
    }
}
