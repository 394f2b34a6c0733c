//! A schedule against the clock of a measured step: what a step takes by the simulator, from the times of
//! its actions.

use super::{Action, Flow, Prediction, Schedule, Transfers};
use crate::pipeline::profile::{ActionSpan, SpanKind, StageProfile, StepProfile};

/// What the parts of a step take on each stage, in seconds: medians over measured steps.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ActionTimes {
    /// Per stage, each of its actions, in their order, with what prepares it and gives its output away.
    /// They differ even where micro-batches cost the same: while the pipeline fills and drains, a stage of a
    /// CPU has the memory's bandwidth to itself.
    #[serde(skip)]
    pub actions: Vec<Vec<f64>>,
    /// Per stage and chunk, the forward in the middle.
    pub forward: Vec<Vec<f64>>,
    /// Per stage and chunk, the backward in the middle.
    pub backward: Vec<Vec<f64>>,
    /// Per stage, what comes before its first action.
    pub begin: Vec<f64>,
    /// Per stage, what comes between its last action and the agreement of all.
    pub norms: Vec<f64>,
    /// The agreement, when all are there.
    pub agreement: f64,
    /// Per stage, what comes after it.
    pub update: Vec<f64>,
    /// A message, from when it is sent and awaited until it is there.
    pub transfer: f64,
}

impl Schedule {
    /// The times of measured steps of this schedule, in all of which a micro-batch of the same place is
    /// taken to cost the same; 0 for what was not measured.
    pub fn action_times(&self, profiles: &[StepProfile]) -> ActionTimes {
        let ranks = 0..self.stages.len();
        let of = |part: &dyn Fn(&StageProfile) -> Vec<f64>, rank: usize| {
            let stages = profiles
                .iter()
                .filter_map(|profile| profile.stages.get(rank));
            median(stages.flat_map(part).collect())
        };
        let per_stage = |part: &dyn Fn(&StageProfile) -> Vec<f64>| -> Vec<f64> {
            ranks.clone().map(|rank| of(part, rank)).collect()
        };
        let that = |wanted: &dyn Fn(Action) -> bool, rank: usize| {
            let those = |stage: &StageProfile| {
                let costs = costs(stage).filter(|&(action, _)| wanted(action));
                costs.map(|(_, seconds)| seconds).collect()
            };
            of(&those, rank)
        };
        let kinds = |flow: Flow| -> Vec<Vec<f64>> {
            let kind = |rank, chunk| that(&|a| a.flow == flow && a.chunk == chunk, rank);
            let stage = |rank| (0..self.virtual_stages).map(|c| kind(rank, c)).collect();
            ranks.clone().map(stage).collect()
        };
        let each = |(rank, actions): (usize, &Vec<Action>)| -> Vec<f64> {
            let times = actions.iter().map(|&action| that(&|a| a == action, rank));
            times.collect()
        };
        let quickest = |profile: &StepProfile| {
            let stages = profile.stages.iter();
            let waits = stages.map(|stage| around_agreement(stage).1);
            waits.reduce(f64::min)
        };
        ActionTimes {
            actions: self.stages.iter().enumerate().map(each).collect(),
            forward: kinds(Flow::Forward),
            backward: kinds(Flow::Backward),
            begin: per_stage(&|stage| begin(stage).into_iter().collect()),
            norms: per_stage(&|stage| vec![around_agreement(stage).0]),
            // Who comes last waits for nobody.
            agreement: median(profiles.iter().filter_map(quickest).collect()),
            update: per_stage(&|stage| vec![around_agreement(stage).2]),
            transfer: median(profiles.iter().flat_map(|p| self.messages(p)).collect()),
        }
    }

    /// What a step takes by the times of its parts: every stage runs its program as early as its inputs
    /// allow, all agree when the last is done, and all update. Stages are taken to have threads of their
    /// own.
    pub fn predict_measured(&self, transfers: Transfers, times: &ActionTimes) -> Prediction {
        let at = |values: &[f64], rank: usize| values.get(rank).copied().unwrap_or(0.0);
        let cost = |rank: usize, action: Action| {
            let place = self.stages[rank].iter().position(|&a| a == action);
            let costs = times.actions.get(rank);
            costs
                .zip(place)
                .map_or(0.0, |(costs, place)| at(costs, place))
        };
        let begin = |rank| at(&times.begin, rank);
        let ends = self.ends(transfers, begin, cost, times.transfer);
        let ready = |(rank, ends): (usize, &Vec<Option<f64>>)| {
            let last = ends.iter().flatten().copied().fold(0.0, f64::max);
            last + at(&times.norms, rank)
        };
        let agreed = ends.iter().enumerate().map(ready).fold(0.0, f64::max) + times.agreement;
        let updates = times.update.iter().copied();
        let step_seconds = agreed + updates.fold(0.0, f64::max);
        Prediction {
            step_seconds,
            idle: self.idle(step_seconds, cost),
        }
    }

    /// How long each message of a measured step took when both sides were ready for it.
    fn messages(&self, profile: &StepProfile) -> Vec<f64> {
        let mut seconds = Vec::new();
        for (rank, stage) in profile.stages.iter().enumerate() {
            for pair in stage.spans.windows(2) {
                let (SpanKind::Wait(_), SpanKind::Run(action)) = (pair[0].what, pair[1].what)
                else {
                    continue;
                };
                let Some(from) = self.source(rank, action) else {
                    continue;
                };
                let sent = profile.stages.get(from).and_then(|stage| {
                    let makes =
                        |a: Action| self.leads_to(from, a, rank, action) && a.flow == action.flow;
                    given(stage, makes)
                });
                if let Some(sent) = sent {
                    seconds.push((pair[0].end - pair[0].begin.max(sent)).max(0.0));
                }
            }
        }
        seconds
    }
}

/// When a stage had given away the output of the action that `makes` it.
fn given(stage: &StageProfile, makes: impl Fn(Action) -> bool) -> Option<f64> {
    let is_it = |span: &ActionSpan| matches!(span.what, SpanKind::Run(action) if makes(action));
    let place = stage.spans.iter().position(is_it)?;
    let next = stage.spans.get(place + 1);
    let exchange = next.filter(|span| matches!(span.what, SpanKind::Exchange(_)));
    Some(exchange.unwrap_or(&stage.spans[place]).end)
}

/// What each action kept its stage busy: the run, what prepared it, and the exchange behind it.
fn costs(stage: &StageProfile) -> impl Iterator<Item = (Action, f64)> {
    let spans = &stage.spans;
    spans.iter().enumerate().filter_map(|(place, span)| {
        let SpanKind::Run(action) = span.what else {
            return None;
        };
        let gives = |span: &&ActionSpan| span.what == SpanKind::Exchange(action.flow);
        let given = spans.get(place + 1).filter(gives);
        // Before it come its preparation, then the wait for its input. The first of all is the step's own.
        let prepares = |span: &&ActionSpan| span.what == SpanKind::Prepare;
        let prepared = place.checked_sub(2).filter(|&before| before > 0);
        let prepared = prepared
            .and_then(|before| spans.get(before))
            .filter(prepares);
        let beside = given.into_iter().chain(prepared).map(ActionSpan::seconds);
        Some((action, span.seconds() + beside.sum::<f64>()))
    })
}

/// What a stage does before anything that belongs to an action.
fn begin(stage: &StageProfile) -> Option<f64> {
    let first = stage.spans.first()?;
    Some(first.seconds())
}

/// Seconds of the end of a step before the agreement, of the agreement, and after it.
fn around_agreement(stage: &StageProfile) -> (f64, f64, f64) {
    let (mut before, mut agreement, mut after) = (0.0, 0.0, 0.0);
    for span in &stage.spans {
        match span.what {
            SpanKind::Agree => agreement += span.seconds(),
            SpanKind::Update if agreement == 0.0 => before += span.seconds(),
            SpanKind::Update => after += span.seconds(),
            _ => {}
        }
    }
    (before, agreement, after)
}

/// The middle value, the mean of the two in the middle, or 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        len if len % 2 == 1 => values[len / 2],
        len => f64::midpoint(values[len / 2 - 1], values[len / 2]),
    }
}
