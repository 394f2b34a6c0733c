//! Starting the workers: one thread per stage, which loads it and then obeys.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};

pub use super::engine::Engine;
use super::engine::Seat;
use super::failure::{Cause, Failure};
use super::gradients::Agreement;
use super::messages::{Command, Reply};
use super::partition::StageSpec;
use super::permits::Permits;
use super::place::{Place, action_name};
use super::schedule::{Operation, Schedule, Transfers};
use super::worker::{Doing, Worker, lock};
use crate::adapter::{AdapterError, ParameterSpec, ParameterState};
use crate::backend::{Backend, BackendError, Pulse};
use crate::checkpoint::TensorSource;
use crate::comm::{Flow, Mailbox, Transport};
use crate::config::model::ModelConfig;
use crate::config::run::{Device, ProductSums, Recompute};
use crate::model::load::{Loader, sums};
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
    /// Where each stage runs, as messages call it.
    pub devices: Vec<Device>,
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
    /// What products of the frozen linear layers are summed in.
    pub product_sums: ProductSums,
    /// Compute threads of all CPU stages together.
    pub threads: usize,
    /// Silence of a stage that owes an answer, after which it counts as hung.
    pub stall_timeout: Duration,
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
/// The first stage that cannot be loaded or connected, or that gives no sign of life.
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
    let schedule = Arc::new(blueprint.schedule.clone());
    let stages = transports.len();
    let mut engine = Engine {
        seats: Vec::with_capacity(stages),
        replies,
        programs: (0..stages).map(|rank| schedule.program(rank)).collect(),
        schedule: Arc::clone(&schedule),
        stall_timeout: blueprint.stall_timeout,
        turns: blueprint.threads < stages,
        parameters: blueprint.trainables.specs().len(),
        transport: String::new(),
        transfers: Transfers::Buffered,
        commands: 0,
        ended: false,
    };
    let permits = Arc::new(Permits::new(blueprint.threads));
    let blueprint = Arc::new(blueprint);
    let device = Arc::new(device);
    for (rank, transport) in transports.into_iter().enumerate() {
        let (command, commands) = unbounded();
        let post = Post {
            rank,
            device: blueprint.devices[rank],
            program: engine.programs[rank].clone(),
            commands,
            replies: reply.clone(),
            pulse: Arc::default(),
            doing: Arc::new(Mutex::new(Doing {
                step: None,
                action: "loading".to_owned(),
            })),
        };
        let (pulse, doing) = (Arc::clone(&post.pulse), Arc::clone(&post.doing));
        let (blueprint, schedule) = (Arc::clone(&blueprint), Arc::clone(&schedule));
        let (permits, opened) = (Arc::clone(&permits), Arc::clone(&device));
        let place = post.device;
        let thread = std::thread::Builder::new().name(format!("stage-{rank}"));
        let spawned = thread.spawn(move || {
            post.serve(|post| {
                let threads = threads_of_stage(blueprint.threads, blueprint.stages.len(), rank);
                let backend = opened(rank, threads, &post.pulse)?;
                let parts = load(&blueprint, &backend, rank, &post.pulse)?;
                let layers = blueprint.config.num_layers;
                // The files may close when the last stage has read its tensors.
                drop(blueprint);
                Ok(Worker {
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
                    pulse: Arc::clone(&post.pulse),
                    doing: Arc::clone(&post.doing),
                    command: 0,
                    noted: None,
                })
            });
        });
        match spawned {
            Ok(thread) => engine.seats.push(Seat {
                device: place,
                commands: command,
                thread,
                pulse,
                doing,
            }),
            Err(error) => {
                engine.give_up();
                return Err(Failure {
                    rank,
                    device: place,
                    step: None,
                    doing: "loading".to_owned(),
                    cause: Cause::Thread(error),
                });
            }
        }
    }
    engine.begin()?;
    Ok(engine)
}

/// A worker's side of the connection with the thread that controls it.
struct Post {
    rank: usize,
    device: Device,
    program: Vec<Operation>,
    commands: Receiver<Command>,
    replies: Sender<(usize, Result<Reply, Failure>)>,
    pulse: Arc<Pulse>,
    doing: Arc<Mutex<Doing>>,
}

impl Post {
    /// Makes the worker and lets it obey until the controlling thread is gone. A worker that failed stays
    /// till then: other stages may still be copying from its memory.
    fn serve<B, T>(self, make: impl FnOnce(&Self) -> Result<Worker<B, T>, Cause>)
    where
        B: Backend,
        T: Transport<B>,
    {
        let Some(mut worker) = self.told(0, guarded(|| make(&self))) else {
            return;
        };
        let mut answer = Reply::Ready;
        loop {
            // The controlling thread is gone when it takes no answer: so is the work.
            if self.replies.send((self.rank, Ok(answer))).is_err() {
                return;
            }
            let Ok(command) = self.commands.recv() else {
                return;
            };
            let obeyed = guarded(|| worker.obey(command));
            match self.told(worker.command, obeyed) {
                Some(reply) => answer = reply,
                None => break,
            }
        }
        while self.commands.recv().is_ok() {}
    }

    /// The result of a command, or nothing where it is a failure, which the controlling thread is told.
    fn told<R>(&self, command: u32, result: Result<R, Cause>) -> Option<R> {
        let cause = match result {
            Ok(result) => return Some(result),
            Err(cause) => cause,
        };
        let Doing { step, action } = lock(&self.doing).clone();
        let place = Place::unpack(self.pulse.place());
        // The thread is on at something else when it hears of what it had queued.
        let late = step.is_some() && cause.is_late() && place.command == command;
        let failure = Failure {
            rank: self.rank,
            device: self.device,
            step,
            doing: match late {
                true => action_name(&self.program, place.operation),
                false => action,
            },
            cause,
        };
        // Nobody listens any more only when the run has ended already.
        let _ = self.replies.send((self.rank, Err(failure)));
        None
    }
}

/// The result of some work, a panic being a failure like any other.
fn guarded<R>(work: impl FnOnce() -> Result<R, Cause>) -> Result<R, Cause> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let message = panic_message(panic.as_ref());
        Err(Cause::Panic { message })
    })
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
        sums: sums(blueprint.product_sums),
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
