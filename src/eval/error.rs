//! Why nothing could be evaluated.

use std::path::PathBuf;

use crate::data::DataError;
use crate::data::tokenizer::TokenizerError;
use crate::generate::{GenerateError, TemplateError};
use crate::pipeline::base::StartError;
use crate::report::FailureClass;

/// Why an evaluation ended early.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// Opening the model.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The rows.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The template that was saved with the adapter.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The stages, or an answer.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A label or an answer that cannot be made text.
    #[error("row {row}: {source}")]
    Text {
        /// Number of the row, from 1.
        row: usize,
        /// What is wrong with its ids.
        source: TokenizerError,
    },
    /// Answers are scored as text, and nothing makes text of ids.
    #[error(
        "answers are scored as text, but {} has no tokenizer: put the tokenizer's files there, or \
         measure the loss alone with --loss-only",
        .folder.display()
    )]
    NoTokenizer {
        /// The model's folder.
        folder: PathBuf,
    },
    /// Text to be continued has no answers.
    #[error(
        "rows of the template plain_text ask nothing that an answer could be scored for: measure \
         their loss alone with --loss-only"
    )]
    NothingAsked,
    /// A loss that says nothing.
    #[error(
        "the loss of rows {first} to {last} is {loss}: weights or activations are not finite (f16 \
         that overflows, or a damaged checkpoint)"
    )]
    NotFinite {
        /// Number of the first row of the micro-batch, from 1.
        first: usize,
        /// Number of its last row.
        last: usize,
        /// The loss.
        loss: f32,
    },
}

impl EvalError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            EvalError::Start(error) => error.is_machine(),
            EvalError::Data(error) => error.is_machine(),
            EvalError::Generate(error) => return error.class(),
            EvalError::Template(_)
            | EvalError::Text { .. }
            | EvalError::NoTokenizer { .. }
            | EvalError::NothingAsked
            | EvalError::NotFinite { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}
