//! The worker threads of a run, seen from the thread that controls it: what is asked of them, what they
//! answer, and what ended them. The first failure wins the report.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use super::failure::{Cause, Failure};
use super::messages::{Command, InferPlan, Reply, StepOutcome, StepPlan};
use super::place::Place;
use super::rehearsal::Rehearsal;
use super::schedule::{Operation, Schedule, Transfers};
use super::watch::{Sight, Task, Verdict, Watch, Watched};
use super::worker::{Doing, lock};
use crate::adapter::ParameterState;
use crate::backend::{MemoryUse, Pulse, leave_behind};
use crate::config::run::Device;
use crate::data::batch::MicroBatch;

/// How often the watch looks at the stages.
const GLANCE: Duration = Duration::from_millis(50);

/// How long workers that are told to give up, or to end, have for it. What hangs in a call of a driver
/// never does.
const GRACE: Duration = Duration::from_secs(3);

/// One worker, seen from outside.
pub(super) struct Seat {
    pub device: Device,
    pub commands: Sender<Command>,
    pub thread: JoinHandle<()>,
    pub pulse: Arc<Pulse>,
    pub doing: Arc<Mutex<Doing>>,
}

/// The worker threads of a run, seen from the thread that controls it.
///
/// While it waits for answers it watches: a stage without a sign of life for longer than the
/// `stall_timeout` of the [`Blueprint`](super::launch::Blueprint) is a failure like any other. No call
/// waits longer than that bound and a few seconds, and dropping the engine does not either: workers that do
/// not end are left behind (see [`any_left_behind`](crate::backend::any_left_behind)).
pub struct Engine {
    pub(super) seats: Vec<Seat>,
    pub(super) replies: Receiver<(usize, Result<Reply, Failure>)>,
    pub(super) schedule: Arc<Schedule>,
    /// What each stage does in a step.
    pub(super) programs: Vec<Vec<Operation>>,
    pub(super) stall_timeout: Duration,
    /// Whether there are fewer compute threads than stages.
    pub(super) turns: bool,
    pub(super) parameters: usize,
    pub(super) transport: String,
    pub(super) transfers: Transfers,
    /// Commands given.
    pub(super) commands: u32,
    /// Whether a stage has failed.
    pub(super) ended: bool,
}

impl Engine {
    /// The same, with how its activations travel in words and for the simulator.
    pub(super) fn over(mut self, transport: String, transfers: Transfers) -> Self {
        self.transport = transport;
        self.transfers = transfers;
        self
    }

    /// How activations travel between GPUs, in words; empty where they do not.
    pub fn transport(&self) -> &str {
        &self.transport
    }

    /// How the simulator has to move data between stages to do as this engine does.
    pub fn transfers(&self) -> Transfers {
        self.transfers
    }

    /// Runs one training step on all stages.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn step(&mut self, plan: StepPlan) -> Result<StepOutcome, Failure> {
        let plan = Arc::new(plan);
        let task = Task::Step(plan.step + 1);
        let outcomes = self.ask(
            task,
            || Command::Step(Arc::clone(&plan)),
            |reply| match reply {
                Reply::Step(outcome) => Some(outcome),
                _ => None,
            },
        )?;
        // Every stage came to the same outcome, by the same numbers.
        let last = outcomes.into_iter().next_back();
        last.ok_or_else(|| self.failure(0, Cause::Vanished))
    }

    /// Forward and backward of a step that does not count, to find out whether there is room for it.
    /// Leaves no trace: weights, moments, loss scale, random numbers and the place in the data are as
    /// they were.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn rehearse(&mut self, rehearsal: Rehearsal) -> Result<(), Failure> {
        let schedule = Arc::clone(&rehearsal.schedule);
        let programs = (0..self.seats.len()).map(|rank| schedule.program(rank));
        let programs = std::mem::replace(&mut self.programs, programs.collect());
        let schedule = std::mem::replace(&mut self.schedule, schedule);
        let rehearsal = Arc::new(rehearsal);
        let rehearsed = self.ask(
            Task::Rehearsal,
            || Command::Rehearse(Arc::clone(&rehearsal)),
            |reply| match reply {
                Reply::Ready => Some(()),
                _ => None,
            },
        );
        (self.schedule, self.programs) = (schedule, programs);
        rehearsed.map(drop).map_err(|failure| Failure {
            doing: format!("rehearsal, {}", failure.doing),
            ..failure
        })
    }

    /// How each stage uses the memory that was planned for it; nothing where none is taken ahead.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn memory(&mut self) -> Result<Vec<Option<MemoryUse>>, Failure> {
        self.ask(
            Task::Snapshot,
            || Command::Memory,
            |reply| match reply {
                Reply::Memory(memory) => Some(memory),
                _ => None,
            },
        )
    }

    /// Sum of the losses of all targets of a micro-batch, with nothing trained and no dropout; leaves
    /// no trace in the run.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn evaluate(&mut self, batch: MicroBatch) -> Result<f32, Failure> {
        let batch = Arc::new(batch);
        let losses = self.ask(
            Task::Pass,
            || Command::Evaluate(Arc::clone(&batch)),
            |reply| match reply {
                Reply::Evaluate(loss) => Some(loss),
                _ => None,
            },
        )?;
        let last = losses.into_iter().flatten().next_back();
        last.ok_or_else(|| self.failure(0, Cause::Vanished))
    }

    /// Runs a forward pass without gradients: logits of the chosen rows, `[rows, V]`.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn infer(&mut self, plan: InferPlan) -> Result<Vec<f32>, Failure> {
        let plan = Arc::new(plan);
        let logits = self.ask(
            Task::Pass,
            || Command::Infer(Arc::clone(&plan)),
            |reply| match reply {
                Reply::Infer(logits) => Some(logits),
                _ => None,
            },
        )?;
        let last = logits.into_iter().flatten().next_back();
        last.ok_or_else(|| self.failure(0, Cause::Vanished))
    }

    /// Values and moments of all trainable parameters, in their order.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn snapshot(&mut self) -> Result<Vec<ParameterState>, Failure> {
        let parts = self.ask(
            Task::Snapshot,
            || Command::Snapshot,
            |reply| match reply {
                Reply::Snapshot(states) => Some(states),
                _ => None,
            },
        )?;
        let mut states: Vec<_> = parts.into_iter().flatten().collect();
        states.sort_by_key(|(index, _)| *index);
        debug_assert_eq!(states.len(), self.parameters);
        Ok(states.into_iter().map(|(_, state)| state).collect())
    }

    /// Waits until every stage is loaded, and then until all are connected.
    pub(super) fn begin(&mut self) -> Result<(), Failure> {
        let ready = |reply| match reply {
            Reply::Ready => Some(()),
            _ => None,
        };
        let loaded = self.collect(Task::Load, ready);
        self.ended |= loaded.is_err();
        loaded?;
        // Nobody connects before everybody is there: a transport may wait for all.
        self.ask(Task::Connect, || Command::Connect, ready)?;
        Ok(())
    }

    pub(super) fn ask<R>(
        &mut self,
        task: Task,
        command: impl Fn() -> Command,
        wanted: impl Fn(Reply) -> Option<R>,
    ) -> Result<Vec<R>, Failure> {
        if self.ended {
            return Err(self.failure(0, Cause::Over));
        }
        self.commands = self.commands.wrapping_add(1);
        for seat in &self.seats {
            // A worker that has ended has said why, which `collect` will find.
            let _ = seat.commands.send(command());
        }
        let collected = self.collect(task, wanted);
        self.ended |= collected.is_err();
        collected
    }

    /// One answer of every stage, in rank order; or what ended one of them.
    fn collect<R>(
        &self,
        task: Task,
        wanted: impl Fn(Reply) -> Option<R>,
    ) -> Result<Vec<R>, Failure> {
        let asked = Instant::now();
        let mut answers: Vec<Option<R>> = self.seats.iter().map(|_| None).collect();
        let mut owing = vec![true; self.seats.len()];
        let mut watch = Watch::new(Watched {
            schedule: &self.schedule,
            programs: &self.programs,
            command: self.commands,
            task,
            bound: self.stall_timeout,
            turns: self.turns,
        });
        let mut looked = asked;
        while owing.contains(&true) {
            match self.replies.recv_timeout(GLANCE) {
                Ok((rank, reply)) => {
                    owing[rank] = false;
                    match reply {
                        Ok(reply) => answers[rank] = wanted(reply),
                        Err(failure) => return Err(self.end(failure, owing)),
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    if let Some(rank) = self.vanished(&owing) {
                        owing[rank] = false;
                        return Err(self.end(self.failure(rank, Cause::Vanished), owing));
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.end(self.failure(0, Cause::Vanished), Vec::new()));
                }
            }
            if looked.elapsed() < GLANCE {
                continue;
            }
            looked = Instant::now();
            if let Some(verdict) = watch.look(&self.sights(&owing, asked)) {
                return Err(self.end(self.stalled(task, verdict), owing));
            }
        }
        let answers = answers.into_iter().collect::<Option<_>>();
        answers.ok_or_else(|| self.failure(0, Cause::Vanished))
    }

    /// Tells all workers to give up, and waits a little for those that owe an answer: none of what
    /// they say wins over `failure`, unless that only follows from it.
    fn end(&self, mut failure: Failure, mut owing: Vec<bool>) -> Failure {
        self.give_up();
        let end = Instant::now() + GRACE;
        while owing.contains(&true) {
            match self.replies.recv_deadline(end) {
                Ok((rank, reply)) => {
                    owing[rank] = false;
                    match reply {
                        Err(other) if failure.is_consequence() && !other.is_consequence() => {
                            failure = other;
                        }
                        _ => {}
                    }
                }
                Err(_) => break,
            }
        }
        failure
    }

    /// Tells all workers to give up whatever they wait for.
    pub(super) fn give_up(&self) {
        for seat in &self.seats {
            seat.pulse.stop();
        }
    }

    /// A worker whose thread has ended without a word: not even a panic does that.
    fn vanished(&self, owing: &[bool]) -> Option<usize> {
        let gone = |rank: &usize| owing[*rank] && self.seats[*rank].thread.is_finished();
        let rank = (0..self.seats.len()).find(gone)?;
        // Its last word may have come in since.
        self.replies.is_empty().then_some(rank)
    }

    fn sights(&self, owing: &[bool], asked: Instant) -> Vec<Sight> {
        let since = asked.elapsed();
        let sight = |(seat, &owes): (&Seat, &bool)| Sight {
            owes,
            place: Place::unpack(seat.pulse.place()),
            // It had no reason to move before.
            silent: seat.pulse.silent_for().min(since),
            lost: seat.pulse.lost_for().min(since),
            doing: lock(&seat.doing).action.clone(),
        };
        self.seats.iter().zip(owing).map(sight).collect()
    }

    fn stalled(&self, task: Task, verdict: Verdict) -> Failure {
        let Verdict {
            rank,
            action,
            silent,
            stall,
        } = verdict;
        Failure {
            step: match task {
                Task::Step(step) => Some(step),
                Task::Load | Task::Connect | Task::Rehearsal | Task::Pass | Task::Snapshot => None,
            },
            doing: action,
            ..self.failure(rank, Cause::Stalled { silent, stall })
        }
    }

    /// A failure of a worker that says nothing itself.
    pub(super) fn failure(&self, rank: usize, cause: Cause) -> Failure {
        let seat = self.seats.get(rank);
        let doing = seat.map(|seat| lock(&seat.doing).clone());
        let Doing { step, action } = doing.unwrap_or_default();
        Failure {
            rank,
            device: seat.map_or(Device::Cpu, |seat| seat.device),
            step,
            doing: action,
            cause,
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.ended {
            self.give_up();
        }
        let threads = self.seats.drain(..).map(|seat| {
            // Without its sender a worker's command channel is closed, and the worker ends.
            drop(seat.commands);
            seat.thread
        });
        let threads: Vec<JoinHandle<()>> = threads.collect();
        let end = Instant::now() + GRACE;
        while !threads.iter().all(JoinHandle::is_finished) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in threads {
            match thread.is_finished() {
                // Panics were caught and reported by the worker itself.
                true => drop(thread.join()),
                false => leave_behind(),
            }
        }
    }
}
