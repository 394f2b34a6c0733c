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
    /// The actions of a step that does not count.
    Rehearsal,
    /// A training step, counted from 1.
    Step(u64),
    /// One micro-batch forward, without gradients.
    Pass,
    /// To read what is trained, or how memory is used.
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
        if self.suspected.iter().any(Option::is_some) {
            return None;
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
            Task::Rehearsal | Task::Step(_) | Task::Pass if !begun => own(),
            Task::Rehearsal | Task::Step(_) => self.state_in_step(rank, sights),
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
                match self.untaken(rank, run, place.operation, sights) {
                    Some(destination) => waits(vec![destination], false),
                    None => State::Works { action },
                }
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

    /// The stage that has not taken what stage `rank` sent before `action`, operation `at` of its program;
    /// nothing where it was taken, or none was sent.
    fn untaken(&self, rank: usize, action: Action, at: usize, sights: &[Sight]) -> Option<usize> {
        let before = self.programs[rank][..at].iter().rev();
        let (sent, destination) = before
            .filter_map(|operation| match *operation {
                Operation::Run(sent) if sent.flow == action.flow => {
                    Some((sent, self.schedule.destination(rank, sent)?))
                }
                _ => None,
            })
            .next()?;
        let Sight { owes, place, .. } = &sights[destination];
        let stages = self.programs.len();
        let here = sent.chunk * stages + rank;
        let chunk = match sent.flow {
            Flow::Forward => here + 1,
            Flow::Backward => here.saturating_sub(1),
        } / stages;
        let user = Operation::Run(Action { chunk, ..sent });
        let program = &self.programs[destination];
        let user = program.iter().position(|operation| *operation == user);
        let used = place.command == self.command
            && user.is_some_and(|user| (place.operation, place.phase) >= (user, Phase::Work));
        (*owes && !used).then_some(destination)
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

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: Duration = Duration::from_secs(10);
    const LONG: Duration = Duration::from_secs(11);
    const SHORT: Duration = Duration::from_secs(1);

    /// A run of three stages at its second step, its stages at the given operations.
    struct Scene {
        schedule: Schedule,
        programs: Vec<Vec<Operation>>,
        sights: Vec<Sight>,
        turns: bool,
    }

    /// Device at the end of what was asked before, thread alive and waiting, both silent for long.
    fn scene() -> Scene {
        let schedule = Schedule::gpipe(3, 4);
        let sight = Sight {
            owes: true,
            place: Place {
                command: 2,
                operation: 0,
                phase: Phase::Work,
            },
            silent: LONG,
            lost: Duration::ZERO,
            doing: "B3".to_owned(),
        };
        Scene {
            programs: (0..3).map(|rank| schedule.program(rank)).collect(),
            schedule,
            sights: vec![sight; 3],
            turns: false,
        }
    }

    impl Scene {
        /// Puts the device of a stage to a named operation of the present command.
        fn at(mut self, rank: usize, action: &str, phase: Phase) -> Self {
            let program = &self.programs[rank];
            let named = |&operation: &usize| action_name(program, operation) == action;
            self.sights[rank].place = Place {
                command: 3,
                operation: (0..=program.len()).find(named).unwrap_or(usize::MAX),
                phase,
            };
            self
        }

        fn with(mut self, rank: usize, change: impl FnOnce(&mut Sight)) -> Self {
            change(&mut self.sights[rank]);
            self
        }

        /// The verdict when it has been like this for long.
        fn judged(&self) -> Option<(usize, String, Stall)> {
            let mut watch = Watch::new(Watched {
                schedule: &self.schedule,
                programs: &self.programs,
                command: 3,
                task: Task::Step(2),
                bound: BOUND,
                turns: self.turns,
            });
            let first = watch.look(&self.sights);
            for since in watch.suspected.iter_mut().flatten() {
                *since -= LONG;
            }
            let second = watch.look(&self.sights);
            first
                .or(second)
                .map(|verdict| (verdict.rank, verdict.action, verdict.stall))
        }
    }

    fn device(rank: usize, action: &str) -> Option<(usize, String, Stall)> {
        Some((rank, action.to_owned(), Stall::Device))
    }

    #[test]
    fn a_device_that_hangs_is_named_with_its_action_not_that_of_its_thread() {
        let scene = scene()
            .at(0, "B0", Phase::Input)
            .at(1, "F1", Phase::Work)
            .at(2, "F1", Phase::Input);
        assert_eq!(scene.judged(), device(1, "F1"));
    }

    #[test]
    fn a_device_that_still_computes_keeps_all_that_wait_for_it_innocent() {
        // Even a thread that is stuck behind a full queue of its waiting device.
        let scene = scene()
            .at(0, "B0", Phase::Input)
            .at(1, "F1", Phase::Work)
            .with(1, |sight| sight.silent = SHORT)
            .at(2, "F1", Phase::Input)
            .with(2, |sight| sight.lost = LONG);
        assert_eq!(scene.judged(), None);
    }

    #[test]
    fn a_thread_that_hangs_is_found_behind_a_device_that_seems_to_wait() {
        // What was last seen of stage 1 is its wait for F1, before stage 0 had sent that.
        let waiting = || {
            scene()
                .at(0, "B0", Phase::Input)
                .at(1, "F1", Phase::Input)
                .at(2, "F1", Phase::Input)
        };
        let lost = |sight: &mut Sight| {
            sight.lost = LONG;
            sight.doing = "F2".to_owned();
        };
        let device_at = Some("F1".to_owned());
        let expected = (1, "F2".to_owned(), Stall::Thread { device_at });
        assert_eq!(waiting().with(1, lost).judged(), Some(expected));
        // With its thread alive it is the transfer.
        let expected = (1, "F1".to_owned(), Stall::Transfer { from: vec![0] });
        assert_eq!(waiting().judged(), Some(expected));
        // And with turns to wait for, nobody has anything to be blamed for but the circle.
        let scene = Scene {
            turns: true,
            ..waiting()
        };
        let (_, _, stall) = scene.judged().unwrap_or((0, String::new(), Stall::Device));
        let waits =
            "stage 0 at B0 for stage 1, stage 1 at F1 for stage 0, stage 2 at F1 for stage 1";
        assert_eq!(
            stall,
            Stall::Circle {
                waits: waits.to_owned()
            }
        );
    }

    #[test]
    fn an_output_that_waits_to_leave_is_the_receiver_s_unless_it_was_taken() {
        let sender = || scene().at(0, "F2", Phase::Output);
        // Stage 1 has not even begun with F1: its own hang.
        let scene = sender().at(1, "F0", Phase::Work).at(2, "F0", Phase::Input);
        assert_eq!(scene.judged(), device(1, "F0"));
        // It computes F1, so F1 has left stage 0, which has no excuse.
        let busy = |sight: &mut Sight| sight.silent = SHORT;
        let scene = sender().at(1, "F1", Phase::Work).with(1, busy);
        let scene = scene.at(2, "F1", Phase::Input);
        assert_eq!(scene.judged(), device(0, "F2"));
    }

    #[test]
    fn the_end_of_a_step_waits_for_those_that_are_further_back() {
        let scene = scene()
            .at(0, "update", Phase::Input)
            .at(1, "B2", Phase::Work)
            .at(2, "update", Phase::Input);
        assert_eq!(scene.judged(), device(1, "B2"));
        let scene = scene
            .at(1, "B2", Phase::Input)
            .at(2, "update", Phase::Input);
        // B2 of stage 1 comes from stage 2, which is far beyond it.
        let expected = (1, "B2".to_owned(), Stall::Transfer { from: vec![2] });
        assert_eq!(scene.judged(), Some(expected));
    }

    #[test]
    fn a_device_at_the_end_of_the_step_before_has_not_begun() {
        let scene = scene()
            .at(0, "B0", Phase::Input)
            .at(2, "F0", Phase::Input)
            .with(1, |sight| sight.doing = "F2".to_owned());
        assert_eq!(scene.judged(), device(1, "F2"));
    }

    #[test]
    fn who_has_answered_is_innocent() {
        let answered = |sight: &mut Sight| sight.owes = false;
        let scene = scene()
            .with(0, answered)
            .with(1, answered)
            .at(2, "update", Phase::Work);
        assert_eq!(scene.judged(), device(2, "update"));
        assert_eq!(scene.with(2, |sight| sight.silent = SHORT).judged(), None);
    }
}
