//! Starting the workers, speaking with them, and ending them: the first failure wins the report.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::failure::{Cause, Failure};
use super::gradients::Agreement;
use super::messages::{Command, InferPlan, Reply, StepOutcome, StepPlan};
use super::partition::StageSpec;
use super::permits::Permits;
use super::rehearsal::Rehearsal;
use super::schedule::Schedule;
use super::worker::{Doing, Worker, lock};
use crate::adapter::{AdapterError, ParameterSpec, ParameterState};
use crate::backend::{Backend, BackendError, MemoryUse, Pulse};
use crate::checkpoint::TensorSource;
use crate::comm::{Flow, Mailbox, Transport};
use crate::config::model::ModelConfig;
use crate::config::run::Recompute;
use crate::data::batch::MicroBatch;
use crate::model::load::Loader;
use crate::model::rotary::RotaryPrecision;
use crate::model::stage::{Stage, StageShape};
use crate::model::trainables::Trainables;
use crate::model::weights::HeadSource;

/// Gives a trainable tensor its values and moments; called from the threads of the stages.
pub type InitialValues =
    Box<dyn Fn(&ParameterSpec) -> Result<ParameterState, AdapterError> + Send + Sync>;

/// Everything that the stages are made from.
pub struct Blueprint {
    /// Shape of the model.
    pub config: ModelConfig,
    /// Its files.
    pub source: Arc<dyn TensorSource>,
    /// Where embedding and head come from.
    pub head_source: HeadSource,
    /// What is trained.
    pub trainables: Trainables,
    /// Values of what is trained.
    pub initial: InitialValues,
    /// The stages.
    pub stages: Vec<StageSpec>,
    /// The order of actions.
    pub schedule: Schedule,
    /// What each stage recomputes; as many as stages, none of them `auto`.
    pub recompute: Vec<Recompute>,
    /// Tokens of the largest micro-batch.
    pub max_rows: usize,
    /// Sequences of the largest micro-batch.
    pub max_sequences: usize,
    /// Rounding of the rotary tables.
    pub rotary: RotaryPrecision,
    /// Compute threads of all CPU stages together.
    pub threads: usize,
}

/// The worker threads of a run, seen from the thread that controls it.
pub struct Engine {
    commands: Vec<Sender<Command>>,
    replies: Receiver<(usize, Result<Reply, Failure>)>,
    workers: Vec<JoinHandle<()>>,
    pulses: Vec<Arc<Pulse>>,
    parameters: usize,
}

/// Threads of each stage out of a budget for all, at least one.
pub fn threads_of_stage(threads: usize, stages: usize, rank: usize) -> usize {
    let extra = usize::from(rank < threads % stages);
    (threads / stages + extra).max(1)
}

/// Loads every stage on a thread of its own and returns when all are ready. `device` makes the
/// backend of a stage from its rank, number of threads and pulse, on the stage's own thread.
///
/// # Errors
/// The first stage that cannot be loaded.
pub fn launch<B, T>(
    blueprint: Blueprint,
    transports: Vec<T>,
    device: impl Fn(usize, usize, &Arc<Pulse>) -> Result<B, BackendError> + Send + Sync + 'static,
) -> Result<Engine, Failure>
where
    B: Backend,
    T: Transport<B> + Send + 'static,
{
    let (reply, replies) = unbounded();
    let mut engine = Engine {
        commands: Vec::with_capacity(transports.len()),
        replies,
        workers: Vec::with_capacity(transports.len()),
        pulses: transports.iter().map(|_| Arc::default()).collect(),
        parameters: blueprint.trainables.specs().len(),
    };
    let permits = Arc::new(Permits::new(blueprint.threads));
    let schedule = Arc::new(blueprint.schedule.clone());
    let blueprint = Arc::new(blueprint);
    let device = Arc::new(device);
    for (rank, transport) in transports.into_iter().enumerate() {
        let (command, commands) = unbounded();
        engine.commands.push(command);
        let doing = Arc::new(Mutex::new(Doing {
            step: None,
            action: "loading".to_owned(),
        }));
        let blueprint = Arc::clone(&blueprint);
        let (permits, schedule) = (Arc::clone(&permits), Arc::clone(&schedule));
        let (device, reply) = (Arc::clone(&device), reply.clone());
        let pulse = Arc::clone(&engine.pulses[rank]);
        let thread = std::thread::Builder::new().name(format!("stage-{rank}"));
        let spawned = thread.spawn(move || {
            let at = Arc::clone(&doing);
            let work = AssertUnwindSafe(|| {
                let threads = threads_of_stage(blueprint.threads, blueprint.stages.len(), rank);
                let loaded = device(rank, threads, &pulse)
                    .map_err(Cause::from)
                    .and_then(|backend| Ok((load(&blueprint, &backend, rank, &pulse)?, backend)));
                // The files may close when the last stage has read its tensors.
                let layers = blueprint.config.num_layers;
                drop(blueprint);
                let (parts, backend) = match loaded {
                    Ok(loaded) => loaded,
                    Err(cause) => return Err(failure(rank, &doing, cause)),
                };
                let mut worker = Worker {
                    backend,
                    transport,
                    stage: parts.stage,
                    schedule,
                    permits,
                    agreement: parts.agreement,
                    layers,
                    cache: None,
                    activations: parts.activations,
                    gradients: parts.gradients,
                    pulse,
                    doing,
                };
                let mut answer = Reply::Ready;
                loop {
                    // The controlling thread is gone when it takes no answer: so is the work.
                    if reply.send((rank, Ok(answer))).is_err() {
                        return Ok(());
                    }
                    match commands.recv() {
                        Ok(command) => answer = worker.obey(command)?,
                        Err(_) => return Ok(()),
                    }
                }
            });
            let ended = catch_unwind(work).unwrap_or_else(|panic| {
                let message = panic_message(panic.as_ref());
                Err(failure(rank, &at, Cause::Panic { message }))
            });
            if let Err(failure) = ended {
                // Nobody listens any more only when the run has ended already.
                let _ = reply.send((rank, Err(failure)));
            }
        });
        match spawned {
            Ok(worker) => engine.workers.push(worker),
            Err(error) => {
                let doing = Mutex::default();
                return Err(failure(rank, &doing, Cause::Thread(error)));
            }
        }
    }
    // Nobody connects before everybody is there: a transport may wait for all.
    let ready = |reply| match reply {
        Reply::Ready => Some(()),
        _ => None,
    };
    engine.collect(ready)?;
    engine.command(|| Command::Connect);
    engine.collect(ready)?;
    Ok(engine)
}

fn failure(rank: usize, doing: &Mutex<Doing>, cause: Cause) -> Failure {
    let Doing { step, action } = lock(doing).clone();
    Failure {
        rank,
        step,
        doing: action,
        cause,
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("without a message").to_owned()
}

/// What a worker is made from beside its backend and its transport.
struct Parts<B: Backend> {
    stage: Stage<B>,
    agreement: Agreement<B>,
    activations: Mailbox<B, f32>,
    gradients: Mailbox<B, B::Element>,
}

fn load<B: Backend>(
    blueprint: &Blueprint,
    backend: &B,
    rank: usize,
    pulse: &Arc<Pulse>,
) -> Result<Parts<B>, Cause> {
    let spec = &blueprint.stages[rank];
    let loader = Loader {
        backend,
        source: blueprint.source.as_ref(),
        config: &blueprint.config,
        trainables: &blueprint.trainables,
        initial: blueprint.initial.as_ref(),
        pulse,
        first_stage: rank == 0,
    };
    let shape = StageShape {
        chunks: blueprint.schedule.chunks(rank, &spec.chunks),
        embedding: spec.embedding,
        head: spec.head,
        max_rows: blueprint.max_rows,
        max_sequences: blueprint.max_sequences,
        recompute: blueprint.recompute[rank],
        rotary: blueprint.rotary,
    };
    let stage = Stage::load(&loader, shape, &blueprint.head_source)?;
    let parameters = blueprint.trainables.specs().len();
    let largest = match blueprint.stages.len() {
        1 => 0,
        _ => stage.largest_activation(),
    };
    Ok(Parts {
        agreement: Agreement::new(backend, parameters, blueprint.schedule.micro_batches)?,
        activations: Mailbox::new(backend, Flow::Forward, largest)?,
        gradients: Mailbox::new(backend, Flow::Backward, largest)?,
        stage,
    })
}

impl Engine {
    /// Runs one training step on all stages.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn step(&mut self, plan: StepPlan) -> Result<StepOutcome, Failure> {
        let plan = Arc::new(plan);
        self.command(|| Command::Step(Arc::clone(&plan)));
        let outcomes = self.collect(|reply| match reply {
            Reply::Step(outcome) => Some(outcome),
            _ => None,
        })?;
        // Every stage came to the same outcome, by the same numbers.
        outcomes.into_iter().next_back().ok_or_else(no_stage)
    }

    /// Forward and backward of a step that does not count, to find out whether there is room for it.
    /// Leaves no trace: weights, moments, loss scale, random numbers and the place in the data are as
    /// they were.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn rehearse(&mut self, rehearsal: Rehearsal) -> Result<(), Failure> {
        let rehearsal = Arc::new(rehearsal);
        self.command(|| Command::Rehearse(Arc::clone(&rehearsal)));
        self.collect(|reply| match reply {
            Reply::Ready => Some(()),
            _ => None,
        })?;
        Ok(())
    }

    /// How each stage uses the memory that was planned for it; nothing where none is taken ahead.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn memory(&mut self) -> Result<Vec<Option<MemoryUse>>, Failure> {
        self.command(|| Command::Memory);
        self.collect(|reply| match reply {
            Reply::Memory(memory) => Some(memory),
            _ => None,
        })
    }

    /// Sum of the losses of all targets of a micro-batch, with nothing trained and no dropout; leaves
    /// no trace in the run.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn evaluate(&mut self, batch: MicroBatch) -> Result<f32, Failure> {
        let batch = Arc::new(batch);
        self.command(|| Command::Evaluate(Arc::clone(&batch)));
        let losses = self.collect(|reply| match reply {
            Reply::Evaluate(loss) => Some(loss),
            _ => None,
        })?;
        losses
            .into_iter()
            .flatten()
            .next_back()
            .ok_or_else(no_stage)
    }

    /// Runs a forward pass without gradients: logits of the chosen rows, `[rows, V]`.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn infer(&mut self, plan: InferPlan) -> Result<Vec<f32>, Failure> {
        let plan = Arc::new(plan);
        self.command(|| Command::Infer(Arc::clone(&plan)));
        let logits = self.collect(|reply| match reply {
            Reply::Infer(logits) => Some(logits),
            _ => None,
        })?;
        logits
            .into_iter()
            .flatten()
            .next_back()
            .ok_or_else(no_stage)
    }

    /// Values and moments of all trainable parameters, in their order.
    ///
    /// # Errors
    /// The first stage that failed; the engine is of no further use then.
    pub fn snapshot(&mut self) -> Result<Vec<ParameterState>, Failure> {
        self.command(|| Command::Snapshot);
        let parts = self.collect(|reply| match reply {
            Reply::Snapshot(states) => Some(states),
            _ => None,
        })?;
        let mut states: Vec<_> = parts.into_iter().flatten().collect();
        states.sort_by_key(|(index, _)| *index);
        debug_assert_eq!(states.len(), self.parameters);
        Ok(states.into_iter().map(|(_, state)| state).collect())
    }

    fn command(&self, command: impl Fn() -> Command) {
        for stage in &self.commands {
            // A stage that has ended has sent its failure, which `collect` will find.
            let _ = stage.send(command());
        }
    }

    /// One answer of every stage, in rank order; or the failure that came first, where failures that
    /// only follow from another stage's come last.
    fn collect<R>(&self, wanted: impl Fn(Reply) -> Option<R>) -> Result<Vec<R>, Failure> {
        let stages = self.commands.len();
        let mut answers: Vec<Option<R>> = (0..stages).map(|_| None).collect();
        let mut failed: Option<Failure> = None;
        for _ in 0..stages {
            match self.replies.recv() {
                Ok((rank, Ok(reply))) => answers[rank] = wanted(reply),
                Ok((_, Err(failure))) => match &failed {
                    Some(first) if !first.is_consequence() || failure.is_consequence() => {}
                    _ => failed = Some(failure),
                },
                Err(_) => break,
            }
        }
        match failed {
            Some(failure) => Err(failure),
            None => answers
                .into_iter()
                .collect::<Option<_>>()
                .ok_or_else(no_stage),
        }
    }
}

/// A worker ended without a word; cannot happen short of the thread being killed.
fn no_stage() -> Failure {
    let message = "a worker ended without a word".to_owned();
    failure(0, &Mutex::default(), Cause::Panic { message })
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.commands.clear();
        for worker in self.workers.drain(..) {
            // Panics were caught and reported by the worker itself.
            let _ = worker.join();
        }
    }
}
