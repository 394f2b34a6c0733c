//! What can end the demo before its verdict.

use std::path::PathBuf;

use crate::checkpoint::CheckpointError;
use crate::config::error::ConfigError;
use crate::data::RowProblem;
use crate::data::tokenizer::TokenizerError;
use crate::generate::GenerateError;
use crate::pipeline::base::StartError;
use crate::report::FailureClass;
use crate::train::TrainError;

/// What ended the demo before its verdict.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The output folder is somebody's.
    #[error(
        "{folder}: is not empty, and no demo made it; name a new folder with --output, or remove this one"
    )]
    FolderTaken {
        /// The folder.
        folder: PathBuf,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model's `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A question that cannot be asked.
    #[error("the question {question:?}: {problem}")]
    Question {
        /// The question.
        question: String,
        /// What is wrong with it.
        problem: RowProblem,
    },
    /// Opening the model.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A training run.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// All went well, but to no effect.
    #[error("a model did not learn what it should: see the line that says FAIL")]
    NotLearned,
    /// Asking.
    #[error(transparent)]
    Generate(#[from] GenerateError),
}

impl DemoError {
    /// Whose turn it is. The demo made all files itself: where they are wrong, it is not the user's.
    pub fn class(&self) -> FailureClass {
        match self {
            DemoError::FolderTaken { .. } | DemoError::Io { .. } => FailureClass::User,
            DemoError::Train(error) if error.class() == FailureClass::Diverged => {
                FailureClass::Diverged
            }
            _ => FailureClass::Machine,
        }
    }
}
