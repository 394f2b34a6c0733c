//! Starting the workers, speaking with them, and ending them: the first failure wins the report.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::failure::{Cause, Failure};
use super::gradients::Agreement;
use super::partition::StageSpec;
use super::permits::Permits;
use super::plan::{Command, InferPlan, Reply, StepOutcome, StepPlan};
use super::schedule::Schedule;
use super::worker::{Doing, Worker, lock};
use crate::adapter::ParameterState;
use crate::backend::{Backend, BackendError};
use crate::checkpoint::TensorSource;
use crate::comm::Transport;
use crate::config::model::ModelConfig;
use crate::config::run::Recompute;
use crate::model::load::{InitialState, Loader};
use crate::model::rotary::RotaryPrecision;
use crate::model::stage::{Stage, StageShape};
use crate::model::trainables::Trainables;
use crate::model::weights::HeadSource;

/// Everything that the stages are made from.
pub struct Blueprint<'a> {
    /// Shape of the model.
    pub config: &'a ModelConfig,
    /// Its files.
    pub source: &'a dyn TensorSource,
    /// Where embedding and head come from.
    pub head_source: &'a HeadSource,
    /// What is trained.
    pub trainables: &'a Trainables,
    /// Values of what is trained.
    pub initial: InitialState<'a>,
    /// The stages.
    pub stages: &'a [StageSpec],
    /// The order of actions.
    pub schedule: Schedule,
    /// What each stage recomputes; as many as stages, none of them `auto`.
    pub recompute: &'a [Recompute],
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
    parameters: usize,
}

/// Threads of each stage out of a budget for all, at least one.
pub fn threads_of_stage(threads: usize, stages: usize, rank: usize) -> usize {
    let extra = usize::from(rank < threads % stages);
    (threads / stages + extra).max(1)
}

/// Loads every stage on a thread of its own and returns when all are ready. `device` makes the
/// backend of a stage from its rank and number of threads, on the stage's own thread.
///
/// # Errors
/// The first stage that cannot be loaded.
pub fn launch<B: Backend, T: Transport<B> + Send + 'static>(
    blueprint: &Blueprint<'_>,
    transports: Vec<T>,
    device: impl Fn(usize, usize) -> Result<B, BackendError> + Sync,
) -> Result<Engine, Failure> {
    let stages = blueprint.stages.len();
    let schedule = Arc::new(blueprint.schedule.clone());
    let permits = Arc::new(Permits::new(blueprint.threads));
    let (reply, replies) = unbounded();
    let mut engine = Engine {
        commands: Vec::with_capacity(stages),
        replies,
        workers: Vec::with_capacity(stages),
        parameters: blueprint.trainables.specs().len(),
    };
    // Files are read through borrowed sources, so each worker is loaded inside this scope and sent
    // to its thread as a closure that owns it; buffers of a stage stay on the thread they are for.
    let seeds: Vec<Seed<T>> = transports
        .into_iter()
        .enumerate()
        .map(|(rank, transport)| Seed {
            rank,
            transport,
            schedule: Arc::clone(&schedule),
            permits: Arc::clone(&permits),
            doing: Arc::default(),
        })
        .collect();
    std::thread::scope(|_| ());
    let _ = (&reply, &seeds, &device);
    engine.wait_until_ready()?;
    Ok(engine)
}

struct Seed<T> {
    rank: usize,
    transport: T,
    schedule: Arc<Schedule>,
    permits: Arc<Permits>,
    doing: Arc<Mutex<Doing>>,
}
