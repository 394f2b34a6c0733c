//! SentencePiece models: UNIGRAM and BPE, id for id as the C++ library 0.1.99 to 0.2.1.
//!
//! The behaviour is that of google/sentencepiece (Apache-2.0), written anew from a specification
//! of it. The stock components of the `tokenizers` crate cannot be exact here: they add scores in
//! another precision, match BYTE pieces in text, and cut at user-defined pieces before they
//! normalise. [`hosted`] puts this module behind that crate's traits.

use std::ops::Range;

mod bpe;
mod charsmap;
mod decode;
mod error;
pub mod hosted;
mod model_proto;
mod normalizer;
mod trie;
mod unigram;
mod vocabulary;
mod wire;

pub use error::SentencePieceError;
pub use model_proto::{
    MAX_MODEL_BYTES, ModelProto, ModelType, NormalizerSpec, Piece, PieceKind, TrainerSpec,
};
use normalizer::TextNormalizer;
use vocabulary::Vocabulary;

/// A piece of normalised text: from the end of the one before to `end`, in bytes.
#[derive(Clone, Copy, Debug)]
struct Segment {
    id: u32,
    end: usize,
}

/// A model that encodes and decodes.
#[derive(Debug)]
pub struct SentencePiece {
    proto: ModelProto,
    vocabulary: Vocabulary,
    normalizer: TextNormalizer,
}

impl SentencePiece {
    /// Checks a model and builds what encoding needs.
    ///
    /// # Errors
    /// Names the piece or the part of the file that breaks a rule: an empty or repeated piece, not
    /// exactly one UNKNOWN piece, BYTE pieces that do not fit byte_fallback, a damaged charsmap.
    pub fn new(proto: ModelProto) -> Result<Self, SentencePieceError> {
        Ok(Self {
            vocabulary: Vocabulary::new(&proto)?,
            normalizer: TextNormalizer::new(proto.normalizer())?,
            proto,
        })
    }

    /// [`ModelProto::parse`], then [`SentencePiece::new`].
    ///
    /// # Errors
    /// Those of the two.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SentencePieceError> {
        Self::new(ModelProto::parse(bytes)?)
    }

    /// The file.
    pub fn proto(&self) -> &ModelProto {
        &self.proto
    }

    /// The id of a piece by its exact text, whatever its kind.
    pub fn piece_to_id(&self, piece: &str) -> Option<u32> {
        self.vocabulary.id_of(piece)
    }

    /// The piece of an id.
    pub fn id_to_piece(&self, id: u32) -> Option<&Piece> {
        self.proto.pieces.get(id as usize)
    }

    /// The ids of `text`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let normalized = self.normalize(text, |_, _| {});
        let mut ids = Vec::with_capacity(normalized.len() / 3);
        self.encode_normalized(&normalized, |id, _| ids.push(id));
        ids
    }

    fn normalize(&self, text: &str, trace: impl FnMut(usize, Range<usize>)) -> String {
        self.normalizer
            .normalize(text, &self.vocabulary.user_defined, trace)
    }

    /// Cuts normalised text: ids and the bytes that they stand for.
    fn encode_normalized(&self, text: &str, mut emit: impl FnMut(u32, Range<usize>)) {
        let segments = match self.proto.trainer().model_type {
            ModelType::Unigram => unigram::segment(&self.vocabulary, text),
            ModelType::Bpe => bpe::segment(&self.vocabulary, text),
        };
        let is_unknown = |segment: &Segment| segment.id == self.vocabulary.unk_id;
        let mut start = 0;
        // Without byte fallback a run of unknown characters is one id.
        let same_id = |a: &Segment, b: &Segment| {
            self.vocabulary.byte_ids.is_none() && is_unknown(a) && is_unknown(b)
        };
        for run in segments.chunk_by(same_id) {
            let end = run[run.len() - 1].end;
            match &self.vocabulary.byte_ids {
                Some(byte_ids) if is_unknown(&run[0]) => {
                    for &byte in &text.as_bytes()[start..end] {
                        emit(byte_ids[usize::from(byte)], start..end);
                    }
                }
                _ => emit(run[0].id, start..end),
            }
            start = end;
        }
    }
}
