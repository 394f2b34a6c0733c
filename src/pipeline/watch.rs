//! The watch over stages that were asked for something: who is to blame when nothing moves.

use std::time::{Duration, Instant};

use super::failure::{Stall, stages};
use super::place::{Phase, Place, action_name};
use super::schedule::{Action, Flow, Operation, Schedule};

/// What all stages were asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Task {
    /// To load.
    Load,
    /// To connect with each other.
    Connect,
    /// A training step, counted from 1.
    Step(u64),
    /// One micro-batch forward, without gradients.
    Pass,
    /// To read what is trained.
    Snapshot,
}

/// One stage as it is seen at a moment.
#[derive(Clone, Debug)]
pub(super) struct Sight {
    /// Whether an answer of it is awaited.
    pub owes: bool,
    /// Where its device is.
    pub place: Place,
    /// Time without a sign of life.
    pub silent: Duration,
    /// Time without any from its thread, which is alive while it waits in small steps.
    pub lost: Duration,
    /// What its thread is at.
    pub doing: String,
}

/// A stage that gave no sign of life for too long.
#[derive(Debug)]
pub(super) struct Verdict {
    pub rank: usize,
    pub action: String,
    pub silent: Duration,
    pub stall: Stall,
}

/// What is watched, and for how long.
#[derive(Clone, Copy)]
pub(super) struct Watched<'a> {
    pub schedule: &'a Schedule,
    /// What each stage does in a step.
    pub programs: &'a [Vec<Operation>],
    /// Number of the command.
    pub command: u32,
    /// What it asks for.
    pub task: Task,
    /// Silence that is too long.
    pub bound: Duration,
    /// Whether stages take turns in computing, and may wait for that too.
    pub turns: bool,
}

/// Watches the stages while they carry out one command.
///
/// A stage that waits for another one is not to blame, unless what it waits for was sent. Where all wait for
/// each other the one whose thread is lost is, and else the one that was to exchange.
pub(super) struct Watch<'a> {
    watched: Watched<'a>,
    /// Per stage, since when it can be to blame.
    suspected: Vec<Option<Instant>>,
}

/// What a stage is at.
enum State {
    /// Nothing that is asked for.
    Answered,
    /// Its own work.
    Works { action: String },
    /// Something that others have to send.
    Waits {
        action: String,
        on: Vec<usize>,
        /// They have.
        sent: bool,
        /// Or it posts sends and receives just now, which waits for nothing.
        exchanges: bool,
    },
}

impl<'a> Watch<'a> {
    /// A watch that begins now.
    pub fn new(watched: Watched<'a>) -> Self {
        Watch {
            suspected: vec![None; watched.programs.len()],
            watched,
        }
    }

    /// The stage to blame, where there is one. To be asked again and again.
    pub fn look(&mut self, sights: &[Sight]) -> Option<Verdict> {
        let states = (0..sights.len()).map(|rank| self.watched.state(rank, sights));
        let states: Vec<State> = states.collect();
        let now = Instant::now();
        let mut worst: Option<(Duration, usize)> = None;
        for (rank, state) in states.iter().enumerate() {
            let suspect = matches!(state, State::Works { .. } | State::Waits { sent: true, .. });
            let since = match suspect {
                true => *self.suspected[rank].get_or_insert(now),
                false => {
                    self.suspected[rank] = None;
                    continue;
                }
            };
            let silent = sights[rank].silent.min(now - since);
            if silent >= self.watched.bound && worst.is_none_or(|(longest, _)| silent > longest) {
                worst = Some((silent, rank));
            }
        }
        if let Some((silent, rank)) = worst {
            return Some(self.watched.verdict(rank, silent, sights, &states));
        }
        let owing = || (0..sights.len()).filter(|&rank| sights[rank].owes);
        let silent = owing().map(|rank| sights[rank].silent).min()?;
        if silent < self.watched.bound {
            return None;
        }
        let lost = owing().filter(|&rank| self.watched.is_lost(&sights[rank]));
        let culprit = lost.max_by_key(|&rank| sights[rank].lost);
        let exchanges = |rank: &usize| {
            matches!(
                states[*rank],
                State::Waits {
                    exchanges: true,
                    ..
                }
            )
        };
        let culprit = culprit
            .or_else(|| owing().find(exchanges))
            .or_else(|| owing().next())?;
        Some(self.watched.verdict(culprit, silent, sights, &states))
    }
}

impl Watched<'_> {
    /// Whether nothing is heard of a stage's thread either. Half the bound leaves room for a last look that
    /// came after the last sign of life.
    fn is_lost(&self, sight: &Sight) -> bool {
        sight.lost > self.bound / 2
    }

    fn verdict(
        &self,
        rank: usize,
        silent: Duration,
        sights: &[Sight],
        states: &[State],
    ) -> Verdict {
        let (sight, state) = (&sights[rank], &states[rank]);
        let at = match state {
            State::Works { action } | State::Waits { action, .. } => action.clone(),
            State::Answered => sight.doing.clone(),
        };
        let (action, stall) = match state {
            _ if self.is_lost(sight) => {
                let device_at = (at != sight.doing).then_some(at);
                (sight.doing.clone(), Stall::Thread { device_at })
            }
            State::Waits { on, sent: true, .. } => (at, Stall::Transfer { from: on.clone() }),
            State::Waits { .. } => {
                let waits = states.iter().enumerate().filter_map(wait_in_words);
                let waits = waits.collect::<Vec<_>>().join(", ");
                (at, Stall::Circle { waits })
            }
            State::Works { .. } | State::Answered => (at, Stall::Device),
        };
        Verdict {
            rank,
            action,
            silent,
            stall,
        }
    }

    fn state(&self, rank: usize, sights: &[Sight]) -> State {
        let sight = &sights[rank];
        if !sight.owes {
            return State::Answered;
        }
        let own = || State::Works {
            action: sight.doing.clone(),
        };
        let begun = sight.place.command == self.command;
        match self.task {
            Task::Load | Task::Snapshot => own(),
            Task::Connect => State::Waits {
                action: sight.doing.clone(),
                on: self.others(rank, |peer| sights[peer].owes),
                sent: false,
                exchanges: false,
            },
            // The device is still at the end of what was asked before.
            Task::Step(_) | Task::Pass if !begun => own(),
            Task::Step(_) => self.state_in_step(rank, sights),
            Task::Pass => self.state_in_pass(rank, sights),
        }
    }

    fn state_in_step(&self, rank: usize, sights: &[Sight]) -> State {
        let place = sights[rank].place;
        let program = &self.programs[rank];
        let action = action_name(program, place.operation);
        let waits = |on, sent| State::Waits {
            action: action.clone(),
            on,
            sent,
            exchanges: false,
        };
        match (program.get(place.operation), place.phase) {
            (_, Phase::Work) => State::Works { action },
            (Some(&Operation::Run(run)), Phase::Input) => {
                let Some(source) = self.schedule.source(rank, run) else {
                    return match self.turns {
                        true => waits(Vec::new(), false),
                        false => State::Works { action },
                    };
                };
                let sent = self.has_sent(source, rank, run, sights);
                waits(vec![source], sent && !self.turns)
            }
            (Some(&Operation::Run(run)), Phase::Output) => {
                let destination = self.schedule.destination(rank, run);
                waits(destination.into_iter().collect(), false)
            }
            (Some(&Operation::Exchange { send, receive, .. }), _) => {
                let from = receive.map(|(peer, _)| peer);
                let mut on: Vec<usize> = send.into_iter().chain(from).collect();
                on.dedup();
                State::Waits {
                    action,
                    on,
                    sent: false,
                    exchanges: true,
                }
            }
            (None, _) => {
                // All stages meet here; those that are further back are waited for.
                let behind =
                    |peer: usize| self.distance(peer, sights) < self.distance(rank, sights);
                waits(self.others(rank, behind), false)
            }
        }
    }

    /// How far a stage is beyond the end of its program; negative before.
    fn distance(&self, rank: usize, sights: &[Sight]) -> isize {
        let Sight { owes, place, .. } = &sights[rank];
        match (owes, place.command == self.command) {
            (false, _) => isize::MAX,
            (true, false) => isize::MIN,
            (true, true) => place.operation as isize - self.programs[rank].len() as isize,
        }
    }

    fn state_in_pass(&self, rank: usize, sights: &[Sight]) -> State {
        let Sight { place, doing, .. } = &sights[rank];
        let action = doing.clone();
        let waits = |peer: usize, sent: bool| State::Waits {
            action: doing.clone(),
            on: vec![peer],
            sent,
            exchanges: false,
        };
        if place.operation >= self.schedule.virtual_stages {
            return State::Works { action };
        }
        let run = Action::forward(0, place.operation);
        let source = self.schedule.source(rank, run);
        let destination = self.schedule.destination(rank, run);
        match (place.phase, source, destination) {
            (Phase::Input, Some(source), _) => {
                let (_, chunk) = self.origin(rank, run);
                let beyond = |place: Place| place.operation > chunk;
                let sight = &sights[source];
                let sent =
                    !sight.owes || sight.place.command == self.command && beyond(sight.place);
                waits(source, sent && !self.turns)
            }
            (Phase::Input, None, _) if self.turns => State::Waits {
                action,
                on: Vec::new(),
                sent: false,
                exchanges: false,
            },
            (Phase::Output, _, Some(destination)) => waits(destination, false),
            _ => State::Works { action },
        }
    }

    /// Stage and chunk that the input of `action` on stage `rank` comes from.
    fn origin(&self, rank: usize, action: Action) -> (usize, usize) {
        let stages = self.programs.len();
        let here = action.chunk * stages + rank;
        let there = match action.flow {
            Flow::Forward => here.saturating_sub(1),
            Flow::Backward => here + 1,
        };
        (there % stages, there / stages)
    }

    /// Whether the input of `action` on stage `rank` has left `source`.
    fn has_sent(&self, source: usize, rank: usize, action: Action, sights: &[Sight]) -> bool {
        let Sight { owes, place, .. } = &sights[source];
        if !owes {
            return true;
        }
        let (_, chunk) = self.origin(rank, action);
        let made = Operation::Run(Action { chunk, ..action });
        let program = &self.programs[source];
        let Some(made) = program.iter().position(|operation| *operation == made) else {
            return false;
        };
        let posts = |operation: &Operation| match operation {
            Operation::Exchange { flow, .. } => *flow == action.flow,
            Operation::Run(_) => false,
        };
        let posted = program[made..].iter().position(posts);
        let posted = posted.map_or(program.len(), |after| made + after);
        place.command == self.command && place.operation > posted
    }

    fn others(&self, rank: usize, which: impl Fn(usize) -> bool) -> Vec<usize> {
        let all = 0..self.programs.len();
        all.filter(|&peer| peer != rank && which(peer)).collect()
    }
}

fn wait_in_words((rank, state): (usize, &State)) -> Option<String> {
    let State::Waits { action, on, .. } = state else {
        return None;
    };
    Some(format!("stage {rank} at {action} for {}", stages(on)))
}
