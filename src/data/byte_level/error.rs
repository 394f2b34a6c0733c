//! Why a byte-level vocabulary cannot be used.

use super::{MAX_TOKEN_BYTES, MAX_TOKENS};

/// Why a byte-level vocabulary cannot be used. The file is named by whoever opens it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ByteLevelError {
    /// More bytes than any such file has.
    #[error("the file has {bytes} bytes, more than {limit}: not a tokenizer of GLM-4")]
    TooLarge {
        /// Its size.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A line that is no token with its rank.
    #[error(
        "line {line} {problem}; each line must be a token in base64, a space, and its rank: fetch the file again"
    )]
    Line {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// More tokens than any model has.
    #[error("there are more than {MAX_TOKENS} tokens: not a tokenizer of GLM-4")]
    TooManyTokens,
    /// Too long a token.
    #[error("token {id} has {bytes} bytes, more than {MAX_TOKEN_BYTES}")]
    LongToken {
        /// Its id or rank.
        id: u32,
        /// Its bytes.
        bytes: usize,
    },
    /// A rank twice, or a hole in the numbering.
    #[error(
        "there are {tokens} tokens, but {missing} is the id of none of them: ids must count from 0 without a gap; fetch the file again"
    )]
    Gap {
        /// Number of tokens.
        tokens: usize,
        /// The first id that is not there.
        missing: u32,
    },
    /// The same bytes twice.
    #[error("tokens {first} and {second} are the same bytes; fetch the file again")]
    Twice {
        /// The lower id.
        first: u32,
        /// The higher id.
        second: u32,
    },
    /// Text that could not be encoded.
    #[error("no token is the single byte 0x{byte:02X}, so that not every text could be encoded")]
    MissingByte {
        /// The byte.
        byte: u8,
    },
    /// A merge of or to something that is no token.
    #[error("merge {number} does not make a token of two tokens; fetch the file again")]
    Merge {
        /// Its number, from 1.
        number: usize,
    },
    /// No JSON, or not the JSON of a tokenizer.
    #[error("not a tokenizer.json: {0}")]
    Json(String),
    /// A part of another kind of tokenizer.
    #[error(
        "{key} is {found}, where GLM-4's tokenizer has {expected}; of other models, the file tokenizer.model or ice_text.model is read, not tokenizer.json"
    )]
    Part {
        /// Where in the file, with dots.
        key: String,
        /// What is there, shortened.
        found: String,
        /// What belongs there.
        expected: String,
    },
    /// The crate refused the vocabulary.
    #[error("the vocabulary cannot be built: {0}")]
    Build(String),
}
