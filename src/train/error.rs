//! What can end a training run.

use std::path::PathBuf;

use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use crate::config::error::ConfigError;
use crate::data::DataError;
use crate::model::ModelError;
use crate::pipeline::base::StartError;
use crate::pipeline::failure::Failure;
use crate::report::FailureClass;

/// What ended a training run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Opening the model or starting the stages.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The training rows.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The trainable parameters.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Checkpoints and results.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A stage.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// `--resume` without anything to resume.
    #[error("{output}: no checkpoint to resume; start without --resume")]
    NothingToResume {
        /// The output folder.
        output: PathBuf,
    },
    /// A checkpoint of another run.
    #[error(
        "{checkpoint}: was made with {field} = {found}, this run has {expected}; a run can only be \
         continued as what it was: set it back, or start a new run in another output folder"
    )]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The setting that differs.
        field: String,
        /// Its value in the checkpoint.
        found: String,
        /// Its value in this run.
        expected: String,
    },
    /// Too many steps in a row without a finite gradient.
    #[error(
        "training diverged at step {step}: {skipped} steps in a row had a loss or a gradient that is \
         not finite; the last batch is saved as {batch}. Try a lower learning rate"
    )]
    Diverged {
        /// Steps done.
        step: u64,
        /// Skipped in a row.
        skipped: u32,
        /// The last batch.
        batch: PathBuf,
    },
}

impl TrainError {
    /// Whether it ended a run that had something to lose, rather than refused to begin one.
    pub fn ends_a_run(&self) -> bool {
        let of_a_stage = matches!(
            self,
            TrainError::Failure(_) | TrainError::Start(StartError::Failure(_))
        );
        let refused = matches!(self, TrainError::Start(_));
        of_a_stage || !refused && self.class() != FailureClass::User
    }

    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            TrainError::Diverged { .. } => return FailureClass::Diverged,
            TrainError::Start(error) => error.is_machine(),
            TrainError::Failure(failure) => failure.is_machine(),
            TrainError::Adapter(error) => error.is_machine(),
            TrainError::Model(error) => error.is_machine(),
            TrainError::Checkpoint(error) => error.is_machine(),
            TrainError::Data(error) => error.is_machine(),
            TrainError::Config(_)
            | TrainError::NothingToResume { .. }
            | TrainError::OtherRun { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}
