//! ModelProto, the contents of a `.model` file (`sentencepiece_model.proto`, proto2).
//!
//! Fields that encoding does not need are kept as they stand, so that a file that is read and
//! written again is the same file.

use super::error::{SentencePieceError, shorten};
use super::wire::{Reader, malformed, put_bytes, put_float, put_number};

/// Largest file read: the largest vocabularies in use have about 5 MB.
pub const MAX_MODEL_BYTES: u64 = 16 << 20;
/// Longest piece, in bytes.
pub(super) const MAX_PIECE_BYTES: usize = 4096;
const MAX_PIECES: usize = 1 << 20;
const BYTE_FALLBACK: u32 = 35;

/// What a piece stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PieceKind {
    /// Text, learned.
    Normal = 1,
    /// Stands for any text that no piece covers.
    Unknown = 2,
    /// Never matches text, decodes to nothing.
    Control = 3,
    /// Text that is always one piece.
    UserDefined = 4,
    /// Text, but not in use.
    Unused = 5,
    /// One byte, for text that no piece covers.
    Byte = 6,
}

impl PieceKind {
    fn from_number(number: u64) -> Option<Self> {
        Some(match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }

    /// Whether text can become this piece.
    pub(super) fn matches_text(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined | Self::Unused)
    }
}

/// One entry of the vocabulary; its id is its index.
#[derive(Clone, Debug, PartialEq)]
pub struct Piece {
    /// The text, with `▁` for a space.
    pub text: String,
    /// Log probability (UNIGRAM) or merge priority (BPE).
    pub score: f32,
    /// What it stands for.
    pub kind: PieceKind,
}

/// How text is cut into pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModelType {
    /// The most probable segmentation.
    Unigram = 1,
    /// Merges of neighbours, best score first.
    Bpe = 2,
}

/// The fields of TrainerSpec that encoding depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerSpec {
    /// UNIGRAM or BPE.
    pub model_type: ModelType,
    /// Whether text that no piece covers becomes BYTE pieces.
    pub byte_fallback: bool,
    /// What the UNKNOWN piece decodes to.
    pub unk_surface: String,
    raw: Vec<u8>,
}

/// The fields of NormalizerSpec that encoding depends on.
#[derive(Clone, Debug, PartialEq)]
pub struct NormalizerSpec {
    /// Replacement rules; empty for identity.
    pub precompiled_charsmap: Vec<u8>,
    /// Whether text gets a leading `▁`.
    pub add_dummy_prefix: bool,
    /// Whether runs of spaces become one, and outer ones vanish.
    pub remove_extra_whitespaces: bool,
    /// Whether a space becomes `▁`.
    pub escape_whitespaces: bool,
    raw: Vec<u8>,
}

/// A SentencePiece model file.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelProto {
    /// The vocabulary.
    pub pieces: Vec<Piece>,
    trainer: TrainerSpec,
    normalizer: NormalizerSpec,
    /// Other top-level fields, as they stand in the file.
    other: Vec<u8>,
}

impl ModelProto {
    /// A new model with the identity normaliser (dummy prefix, spaces kept, as ChatGLM2's).
    pub fn new(model_type: ModelType, byte_fallback: bool, pieces: Vec<Piece>) -> Self {
        let mut trainer = Vec::new();
        put_number(&mut trainer, 3, model_type as u64);
        put_number(&mut trainer, 4, pieces.len() as u64);
        put_number(&mut trainer, BYTE_FALLBACK, u64::from(byte_fallback));
        let mut normalizer = Vec::new();
        put_bytes(&mut normalizer, 1, b"identity");
        put_number(&mut normalizer, 4, 0);
        Self {
            pieces,
            trainer: TrainerSpec {
                model_type,
                byte_fallback,
                unk_surface: default_unk_surface(),
                raw: trainer,
            },
            normalizer: NormalizerSpec {
                precompiled_charsmap: Vec::new(),
                add_dummy_prefix: true,
                remove_extra_whitespaces: false,
                escape_whitespaces: true,
                raw: normalizer,
            },
            other: Vec::new(),
        }
    }

    /// Reads a file's bytes. The rules of the vocabulary are checked by
    /// [`SentencePiece::new`](super::SentencePiece::new), not here.
    pub fn parse(bytes: &[u8]) -> Result<Self, SentencePieceError> {
        if bytes.len() as u64 > MAX_MODEL_BYTES {
            return Err(SentencePieceError::TooLarge {
                bytes: bytes.len() as u64,
                limit: MAX_MODEL_BYTES,
            });
        }
        let (mut trainer, mut normalizer, mut other) = (Vec::new(), Vec::new(), Vec::new());
        // Where the latest of the two specs starts; protobuf merges repeated ones by concatenation.
        let (mut trainer_at, mut normalizer_at) = (0, 0);
        let mut pieces = Vec::new();
        let mut reader = Reader::new(bytes, 0);
        while let Some(field) = reader.next_field()? {
            match field.number {
                1 => {
                    if pieces.len() == MAX_PIECES {
                        return Err(malformed(
                            field.offset,
                            format!("more than {MAX_PIECES} pieces"),
                        ));
                    }
                    let message = field.bytes("pieces")?;
                    pieces.push(parse_piece(message, field.offset, pieces.len())?);
                }
                2 => {
                    trainer.extend_from_slice(field.bytes("trainer_spec")?);
                    trainer_at = field.offset;
                }
                3 => {
                    normalizer.extend_from_slice(field.bytes("normalizer_spec")?);
                    normalizer_at = field.offset;
                }
                5 => {
                    let message = field.bytes("denormalizer_spec")?.to_vec();
                    let spec = parse_normalizer(message, field.offset)?;
                    if !spec.precompiled_charsmap.is_empty() {
                        return Err(unsupported("rewrites decoded text (denormalizer_spec)"));
                    }
                    other.extend_from_slice(field.raw);
                }
                _ => other.extend_from_slice(field.raw),
            }
        }
        Ok(Self {
            pieces,
            trainer: parse_trainer(trainer, trainer_at)?,
            normalizer: parse_normalizer(normalizer, normalizer_at)?,
            other,
        })
    }

    /// How text is cut into pieces.
    pub fn trainer(&self) -> &TrainerSpec {
        &self.trainer
    }

    /// How text is normalised first.
    pub fn normalizer(&self) -> &NormalizerSpec {
        &self.normalizer
    }

    /// Switches byte fallback on; the 256 BYTE pieces must be in the vocabulary by the time the
    /// model is used.
    pub fn enable_byte_fallback(&mut self) -> Result<(), SentencePieceError> {
        let mut on = Vec::new();
        put_number(&mut on, BYTE_FALLBACK, 1);
        let mut raw = Vec::with_capacity(self.trainer.raw.len() + on.len());
        let mut reader = Reader::new(&self.trainer.raw, 0);
        let mut written = false;
        while let Some(field) = reader.next_field()? {
            if field.number > BYTE_FALLBACK && !written {
                raw.extend_from_slice(&on);
                written = true;
            }
            if field.number != BYTE_FALLBACK {
                raw.extend_from_slice(field.raw);
            }
        }
        if !written {
            raw.extend_from_slice(&on);
        }
        self.trainer.raw = raw;
        self.trainer.byte_fallback = true;
        Ok(())
    }

    /// The bytes of the file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut message = Vec::new();
        for piece in &self.pieces {
            message.clear();
            put_bytes(&mut message, 1, piece.text.as_bytes());
            put_float(&mut message, 2, piece.score);
            if piece.kind != PieceKind::Normal {
                put_number(&mut message, 3, piece.kind as u64);
            }
            put_bytes(&mut out, 1, &message);
        }
        put_bytes(&mut out, 2, &self.trainer.raw);
        put_bytes(&mut out, 3, &self.normalizer.raw);
        out.extend_from_slice(&self.other);
        out
    }
}

fn default_unk_surface() -> String {
    " \u{2047} ".to_owned()
}

fn unsupported(what: &str) -> SentencePieceError {
    SentencePieceError::Unsupported {
        what: what.to_owned(),
    }
}

fn parse_piece(message: &[u8], at: usize, index: usize) -> Result<Piece, SentencePieceError> {
    let (mut text, mut score, mut kind) = ("", 0.0, PieceKind::Normal);
    let mut reader = Reader::new(message, at);
    while let Some(field) = reader.next_field()? {
        match field.number {
            1 => text = field.text("piece")?,
            2 => score = field.float("score")?,
            3 => {
                let number = field.varint("type")?;
                kind = PieceKind::from_number(number).ok_or_else(|| {
                    malformed(field.offset, format!("piece {index} has type {number}"))
                })?;
            }
            _ => {}
        }
    }
    let problem = if text.is_empty() {
        "is empty".to_owned()
    } else if text.len() > MAX_PIECE_BYTES {
        format!("has {} bytes, more than {MAX_PIECE_BYTES}", text.len())
    } else if !score.is_finite() {
        format!("has the score {score}")
    } else {
        return Ok(Piece {
            text: text.to_owned(),
            score,
            kind,
        });
    };
    Err(SentencePieceError::Piece {
        index,
        piece: shorten(text),
        problem,
    })
}

fn parse_trainer(raw: Vec<u8>, at: usize) -> Result<TrainerSpec, SentencePieceError> {
    let mut model_type = ModelType::Unigram;
    let mut byte_fallback = false;
    let mut unk_surface = default_unk_surface();
    let mut reader = Reader::new(&raw, at);
    while let Some(field) = reader.next_field()? {
        match field.number {
            3 => {
                model_type = match field.varint("model_type")? {
                    1 => ModelType::Unigram,
                    2 => ModelType::Bpe,
                    3 => return Err(unsupported("is of type WORD")),
                    4 => return Err(unsupported("is of type CHAR")),
                    other => {
                        return Err(malformed(field.offset, format!("model_type {other}")));
                    }
                }
            }
            24 if field.varint("treat_whitespace_as_suffix")? != 0 => {
                return Err(unsupported(
                    "puts spaces behind words (treat_whitespace_as_suffix)",
                ));
            }
            BYTE_FALLBACK => byte_fallback = field.varint("byte_fallback")? != 0,
            44 => unk_surface = field.text("unk_surface")?.to_owned(),
            _ => {}
        }
    }
    Ok(TrainerSpec {
        model_type,
        byte_fallback,
        unk_surface,
        raw,
    })
}

fn parse_normalizer(raw: Vec<u8>, at: usize) -> Result<NormalizerSpec, SentencePieceError> {
    let (mut charsmap, mut dummy, mut remove, mut escape) = (Vec::new(), true, true, true);
    let mut reader = Reader::new(&raw, at);
    while let Some(field) = reader.next_field()? {
        match field.number {
            2 => charsmap = field.bytes("precompiled_charsmap")?.to_vec(),
            3 => dummy = field.varint("add_dummy_prefix")? != 0,
            4 => remove = field.varint("remove_extra_whitespaces")? != 0,
            5 => escape = field.varint("escape_whitespaces")? != 0,
            _ => {}
        }
    }
    Ok(NormalizerSpec {
        precompiled_charsmap: charsmap,
        add_dummy_prefix: dummy,
        remove_extra_whitespaces: remove,
        escape_whitespaces: escape,
        raw,
    })
}
