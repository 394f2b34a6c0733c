//! Why nothing could be generated.

use std::path::PathBuf;

use super::question::RowError;
use super::sampling::SampleError;
use crate::adapter::AdapterError;
use crate::checkpoint::CheckpointError;
use crate::config::generate::SamplingProblem;
use crate::data::RowProblem;
use crate::data::tokenizer::TokenizerError;
use crate::model::ModelError;
use crate::pipeline::base::StartError;
use crate::pipeline::failure::Failure;
use crate::report::FailureClass;

/// Why nothing more could be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Opening the model or starting the stages.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The adapter's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The template that was saved with the adapter.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A setting of sampling.
    #[error(transparent)]
    Sampling(#[from] SamplingProblem),
    /// A row of the input.
    #[error(transparent)]
    Row(#[from] RowError),
    /// A prompt that the model cannot take.
    #[error("line {line} of the prompts: {problem}")]
    Prompt {
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: RowProblem,
    },
    /// A question that leaves no room for its answer, even without earlier turns.
    #[error(
        "the question has {tokens} tokens; the model takes {limit} beside an answer of {new_tokens} \
         (max_sequence_length {max_sequence_length}): shorten it, or lower --max-new-tokens"
    )]
    TooLong {
        /// Its ids.
        tokens: usize,
        /// Most ids of a prompt.
        limit: usize,
        /// `max_new_tokens`.
        new_tokens: usize,
        /// The model's.
        max_sequence_length: usize,
    },
    /// A question without text.
    #[error("the question is empty")]
    EmptyQuestion,
    /// Answers as long as the model's longest sequence.
    #[error(
        "--max-new-tokens {new_tokens} leaves no room for a question: this model takes \
         {max_sequence_length} tokens of question and answer together"
    )]
    NoRoom {
        /// `max_new_tokens`.
        new_tokens: usize,
        /// The model's.
        max_sequence_length: usize,
    },
    /// Choosing a token.
    #[error("token {token} of the answer cannot be chosen: {problem}")]
    Sample {
        /// Number of the token, from 1.
        token: usize,
        /// Why.
        problem: SampleError,
    },
    /// A stage.
    #[error(transparent)]
    Failure(#[from] Failure),
}

/// Why a `template.toml` cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// It cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It is not what training writes.
    #[error("{path}: not a template: {problem}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl GenerateError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            GenerateError::Start(error) => error.is_machine(),
            GenerateError::Failure(failure) => failure.is_machine(),
            GenerateError::Adapter(error) => error.is_machine(),
            GenerateError::Checkpoint(error) => error.is_machine(),
            GenerateError::Model(error) => error.is_machine(),
            GenerateError::Tokenizer(_)
            | GenerateError::Template(_)
            | GenerateError::Sampling(_)
            | GenerateError::Row(_)
            | GenerateError::Prompt { .. }
            | GenerateError::TooLong { .. }
            | GenerateError::EmptyQuestion
            | GenerateError::NoRoom { .. }
            | GenerateError::Sample { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }

    /// The line of the input that it is about, from 1.
    pub fn line(&self) -> Option<usize> {
        match self {
            GenerateError::Prompt { line, .. } => Some(*line),
            GenerateError::Row(error) => Some(error.line),
            _ => None,
        }
    }
}
