//! What can be wrong with a SentencePiece file or with ids handed to it.

/// Why a SentencePiece model could not be read, or ids could not be decoded.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SentencePieceError {
    /// The file is larger than any real vocabulary.
    #[error(
        "the file has {bytes} bytes and a SentencePiece model at most {limit}: is it the weights file?"
    )]
    TooLarge {
        /// Size found.
        bytes: u64,
        /// Largest size read.
        limit: u64,
    },
    /// The bytes are no protobuf message, or a field has the wrong type.
    #[error(
        "not a SentencePiece model, or a damaged one: {problem} at byte {offset}; fetch the file again"
    )]
    Malformed {
        /// Where in the file.
        offset: usize,
        /// What is wrong there.
        problem: String,
    },
    /// One piece of the vocabulary breaks a rule.
    #[error("piece {index} (`{piece}`) {problem}; fetch the file again")]
    Piece {
        /// Its id.
        index: usize,
        /// Its text, shortened.
        piece: String,
        /// The rule that it breaks.
        problem: String,
    },
    /// The vocabulary as a whole breaks a rule.
    #[error("the vocabulary {problem}; fetch the file again")]
    Vocabulary {
        /// The rule that it breaks.
        problem: String,
    },
    /// The normaliser's rules are damaged.
    #[error("the normaliser's precompiled_charsmap {problem}; fetch the file again")]
    Charsmap {
        /// What is wrong with it.
        problem: String,
    },
    /// A valid file of a kind that this module does not encode.
    #[error("the model {what}, which is not supported; ChatGLM's own files do not")]
    Unsupported {
        /// The property of the file.
        what: String,
    },
    /// An id that no piece has.
    #[error(
        "id {id} has no piece: the vocabulary has {pieces} (0 to {last}); do the model and the tokenizer belong together?",
        last = pieces.saturating_sub(1)
    )]
    IdOutOfRange {
        /// The id.
        id: i64,
        /// Number of pieces.
        pieces: usize,
    },
}

/// The start of a piece, fit for a message.
pub(super) fn shorten(piece: &str) -> String {
    const LONGEST: usize = 40;
    let mut short: String = piece.chars().take(LONGEST).collect();
    if short.len() < piece.len() {
        short.push('…');
    }
    short.escape_debug().to_string()
}
