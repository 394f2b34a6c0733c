//! Why a tokenizer could not be loaded or used.

use std::path::PathBuf;

use super::{ConversationProblem, EraError};
use crate::data::byte_level::ByteLevelError;
use crate::data::sentencepiece::SentencePieceError;

/// Why a tokenizer could not be loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A folder, pipe or device stands where a file was expected.
    #[error("{path} is not a plain file; put the real file there")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A Git LFS pointer, a few lines of text, instead of the file it stands for.
    #[error(
        "{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file again"
    )]
    LfsPointer {
        /// The pointer file.
        path: PathBuf,
    },
    /// The folder has no tokenizer file.
    #[error(
        "{folder}: no ice_text.model, tokenizer.model or tokenizer.json is there; put the tokenizer file of the model into its folder"
    )]
    NoFile {
        /// The folder searched.
        folder: PathBuf,
    },
    /// A SentencePiece file is damaged.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: SentencePieceError,
    },
    /// `tokenizer_config.json` is damaged.
    #[error("{path}: {problem}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A byte-level file is damaged, or not GLM-4's.
    #[error("{path}: {source}")]
    ByteLevelFile {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: ByteLevelError,
    },
    /// Byte-level tokens that make no vocabulary.
    #[error(transparent)]
    ByteLevel(#[from] ByteLevelError),
    /// A piece that the generation needs is not in the vocabulary.
    #[error(
        "the vocabulary has no piece `{piece}`, which {needed_by} needs: is it another model's?"
    )]
    MissingPiece {
        /// The piece.
        piece: String,
        /// Who needs it.
        needed_by: &'static str,
    },
    /// A special of GLM-4 that the file does not have in its place.
    #[error("no special token {name} with the id {id}, where GLM-4 has it: is it another model's?")]
    MissingSpecial {
        /// The token.
        name: &'static str,
        /// The id that it should have.
        id: u32,
    },
    /// The tokenizer and the model do not belong together.
    #[error(transparent)]
    Era(#[from] EraError),
    /// Ids or pieces that the model does not have.
    #[error(transparent)]
    SentencePiece(#[from] SentencePieceError),
    /// An id beyond the vocabulary and its specials.
    #[error(
        "id {id} is beyond the tokenizer's {size} ids: mask the logits from {size} on, or check that model and tokenizer belong together"
    )]
    IdOutOfRange {
        /// The id.
        id: u32,
        /// First id that is not in use.
        size: u32,
    },
    /// Messages that make no conversation.
    #[error("the conversation cannot be put into the model's form: {0}")]
    Conversation(#[from] ConversationProblem),
    /// Something that this generation does not define.
    #[error("{what} is defined for {defined_for} only")]
    NotInGeneration {
        /// What was asked for.
        what: &'static str,
        /// Who has it.
        defined_for: &'static str,
    },
}
