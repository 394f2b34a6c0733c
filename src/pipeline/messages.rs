//! What the controlling thread asks of the workers, and what they answer.

use super::profile::Record;
use super::rehearsal::Rehearsal;
use crate::adapter::ParameterState;
use crate::backend::MemoryUse;
use crate::config::run::OptimizerSection;
use crate::data::batch::MicroBatch;
use crate::model::head::LogitsRows;

/// One training step, the same for every stage.
#[derive(Clone, Debug)]
pub struct StepPlan {
    /// Step of the run, from 0; advances also when an update is skipped.
    pub step: u64,
    /// Updates applied before this step; AdamW's t is one more.
    pub updates: u64,
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Factor on the loss, taken out again before gradients are used.
    pub loss_scale: f32,
    /// The micro-batches, as many as the schedule has.
    pub micro_batches: Vec<MicroBatch>,
    /// Weight of each target of each micro-batch in the loss of the step; one per micro-batch.
    pub target_weights: Vec<f32>,
    /// Optimiser settings.
    pub optimizer: OptimizerSection,
    /// Key of all random numbers.
    pub seed: u64,
}

impl StepPlan {
    /// Index of a micro-batch in the whole run.
    pub fn run_micro_batch(&self, micro_batch: usize) -> u64 {
        self.step * self.micro_batches.len() as u64 + micro_batch as u64
    }
}

/// What a step did; every stage comes to the same.
#[derive(Clone, Debug, PartialEq)]
pub struct StepOutcome {
    /// Sum of the losses of all targets of each micro-batch.
    pub loss_sums: Vec<f32>,
    /// Global L2 norm of the gradient before clipping; not finite when the step was skipped.
    pub grad_norm: f32,
    /// Factor that clipping put on the gradient.
    pub clip: f32,
    /// Whether the update was applied.
    pub applied: bool,
}

/// A forward pass without gradients, the same for every stage.
#[derive(Clone, Debug)]
pub struct InferPlan {
    /// The new tokens.
    pub batch: MicroBatch,
    /// Which rows' logits are wanted.
    pub rows: LogitsRows,
    /// Key/value cache: where each sequence lies in it; without one the batch stands alone.
    pub cache: Option<CachePlan>,
}

/// Where the sequences of a batch lie in the key/value cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachePlan {
    /// Rows of a cache to be made anew first; `None` goes on with the one there is.
    pub renew: Option<usize>,
    /// First row of each sequence.
    pub starts: Vec<usize>,
    /// Tokens of each sequence that are in the cache already.
    pub filled: Vec<usize>,
}

/// What the controlling thread asks for.
pub(super) enum Command {
    /// Connect with the other stages.
    Connect,
    /// The actions of a step, without its update.
    Rehearse(std::sync::Arc<Rehearsal>),
    /// One training step.
    Step(std::sync::Arc<StepPlan>),
    /// The same, measured.
    Profile(std::sync::Arc<StepPlan>),
    /// Loss of a micro-batch, without a gradient.
    Evaluate(std::sync::Arc<MicroBatch>),
    /// A forward pass.
    Infer(std::sync::Arc<InferPlan>),
    /// Values and moments of everything that is trained.
    Snapshot,
    /// How the memory that was planned is used.
    Memory,
}

/// What a worker answers.
pub(super) enum Reply {
    /// Its stage is loaded, or connected, or rehearsed.
    Ready,
    /// The step is done.
    Step(StepOutcome),
    /// The step is done, and measured.
    Profile(StepOutcome, Record),
    /// Sum of the losses of all targets, on the last stage.
    Evaluate(Option<f32>),
    /// Logits, on the last stage.
    Infer(Option<Vec<f32>>),
    /// Place in the order of all parameters, and state.
    Snapshot(Vec<(usize, ParameterState)>),
    /// Planned memory; nothing where none is taken ahead.
    Memory(Option<MemoryUse>),
}
