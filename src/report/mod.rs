//! What a run says about itself: plain data from the engine, and the two places it goes to.
//!
//! The engine makes [`Event`]s; [`progress`] shows them to a person, [`metrics`] keeps the steps for
//! programs. This room imports nothing of the rest of the crate.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

pub mod atomic_file;
pub mod metrics;
pub mod progress;
pub mod tensorboard;
pub mod timeline;

/// Something that happened in a run.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Model and data are loaded, the first step is next.
    RunStarted(RunStarted),
    /// An optimiser step is over.
    Step(StepReport),
    /// The loss of the validation rows was measured.
    Validation(ValidationReport),
    /// The data is being tokenised; nothing of it is seen where it comes from the cache.
    Tokenising(TokenisingReport),
    /// Rows are being evaluated.
    Evaluating(EvaluatingReport),
    /// A checkpoint is complete on disk.
    CheckpointSaved {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Optimiser steps that it holds.
        step: u64,
    },
    /// How the memory that was planned was used, at the end of a run on GPUs.
    Memory(MemoryReport),
    /// Something the user should know that does not end the run.
    Warning(String),
    /// All steps are done and the result is saved.
    Finished(RunFinished),
}

/// What a run consists of, at its start.
#[derive(Clone, Debug, PartialEq)]
pub struct RunStarted {
    /// The stages, first to last.
    pub stages: Vec<StageSummary>,
    /// How activations travel between GPUs, in words; empty where they do not.
    pub transport: String,
    /// Numbers that are trained.
    pub trainable_parameters: u64,
    /// Numbers in the base model.
    pub model_parameters: u64,
    /// Optimiser steps already done: 0, or those of the checkpoint that was resumed.
    pub start_step: u64,
    /// Optimiser steps at the end.
    pub max_steps: u64,
    /// The run's output folder, which exists.
    pub output: PathBuf,
    /// The resolved configuration, as saved.
    pub config_path: PathBuf,
}

/// One stage of the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSummary {
    /// Where it runs: `cpu`, or a CUDA device number.
    pub device: String,
    /// Its blocks: one run, or several with the interleaved schedule.
    pub blocks: Vec<Range<usize>>,
}

/// What one optimiser step did. The numbers are those of the whole step, over all stages.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepReport {
    /// Which step this was, from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub max_steps: u64,
    /// Loss of the step, in the run's normalisation.
    #[serde(serialize_with = "widened")]
    pub loss: f32,
    /// Mean loss over the targets of each micro-batch, in order.
    #[serde(serialize_with = "all_widened")]
    pub micro_losses: Vec<f32>,
    /// Learning rate that this step used.
    pub learning_rate: f64,
    /// Global L2 norm of the gradient before clipping.
    #[serde(serialize_with = "widened")]
    pub grad_norm: f32,
    /// Whether the gradient was clipped.
    pub clipped: bool,
    /// Whether the update was skipped because the gradient was not finite.
    pub skipped: bool,
    /// Factor the loss was scaled by; 1 without scaling.
    #[serde(serialize_with = "widened")]
    pub loss_scale: f32,
    /// Targets in the step.
    pub target_tokens: u64,
    /// Tokens in the step, targets or not.
    pub tokens: u64,
    /// Wall time of the step.
    pub seconds: f64,
}

/// Loss of the validation rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ValidationReport {
    /// Steps done.
    pub step: u64,
    /// Mean loss over all their targets.
    #[serde(serialize_with = "widened")]
    pub loss: f32,
    /// Targets.
    pub target_tokens: u64,
}

/// How the memory that was planned was used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryReport {
    /// Steps done.
    pub step: u64,
    /// The stages, first to last.
    pub stages: Vec<StageMemory>,
}

/// Memory of one stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StageMemory {
    /// Where it runs: a CUDA device number.
    pub device: String,
    /// Bytes planned, and taken at once when the run started.
    pub planned_bytes: u64,
    /// Bytes of them that were used.
    pub used_bytes: u64,
    /// Bytes that had no room there.
    pub beside_bytes: u64,
}

/// How far the data is tokenised.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenisingReport {
    /// Bytes of the files read.
    pub bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
    /// Rows so far.
    pub rows: u64,
    /// Tokens so far.
    pub tokens: u64,
    /// Wall time so far.
    pub seconds: f64,
    /// Whether that was all.
    pub done: bool,
}

/// How far rows are evaluated.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaluatingReport {
    /// What is being made of them: `loss` or `answers`.
    pub what: &'static str,
    /// Rows so far.
    pub rows: u64,
    /// All rows.
    pub total_rows: u64,
    /// Wall time so far.
    pub seconds: f64,
}

/// How a run ended that did all its steps.
#[derive(Clone, Debug, PartialEq)]
pub struct RunFinished {
    /// Optimiser steps done.
    pub steps: u64,
    /// Wall time since the start (or the resume) of the run.
    pub seconds: f64,
    /// The trained adapter or model.
    pub result: PathBuf,
}

/// Whose turn it is after a failure. The command line turns it into an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureClass {
    /// The user can fix it: usage, configuration, data, model folder, checkpoint.
    User,
    /// The machine (disk full, out of memory) or a bug.
    Machine,
    /// Training diverged.
    Diverged,
    /// A signal asked for the end; what was done is saved.
    Interrupted,
}

/// An f32 as the f64 of the same value: shortest digits would come back exact only to those who read
/// them as f32. Not-a-number and infinity become null, for JSON has neither.
fn widened<S: Serializer>(value: &f32, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(f64::from(*value))
}

fn all_widened<S: Serializer>(values: &[f32], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(values.iter().copied().map(f64::from))
}
