//! ChatGLM's tokenizers: a SentencePiece model plus what surrounds it in each generation.
//!
//! ChatGLM-6B wraps text in whitespace pieces, shifts ids by the number of image tokens and has
//! its special tokens in the vocabulary; ChatGLM2 and 3 number theirs behind it.

use std::path::PathBuf;
use std::sync::Arc;

use super::sentencepiece::{ModelProto, SentencePiece, SentencePieceError};

mod era;
mod files;
mod inputs;
mod special;
mod text;

pub use era::{ConfigIds, EraError, EraVerdict, EraWarning, TokenizerFacts};
pub use files::TokenizerFiles;
pub use inputs::{ChatMessage, ChatRole, InputRule};
use special::SpecialText;
pub use special::{SpecialIds, append_chatglm_pieces};

/// The history of ChatGLM-6B's tokenizer files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Era {
    /// To 6 April 2023: 130,000 pieces in the file, the specials appended at load, ids + 20,000.
    A,
    /// For hours on 6 April 2023, and in copies: all 130,344 pieces in the file, ids + 20,000.
    B,
    /// Since: all pieces in the file, no image tokens.
    C,
}

/// Which model family a tokenizer serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// ChatGLM-6B.
    ChatGlm(Era),
    /// ChatGLM2-6B.
    ChatGlm2,
    /// ChatGLM3-6B: ChatGLM2's with role tokens.
    ChatGlm3,
}

/// What happens to text that looks like a special token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LiteralSpecials {
    /// It stays text: right for what users write.
    #[default]
    AsText,
    /// It becomes the special id, and whitespace beside it vanishes, as in the Hugging Face
    /// tokenizers of each era (ChatGLM2 and 3 split nothing).
    AsReference,
}

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
        "{folder}: neither ice_text.model nor tokenizer.model is there; put the tokenizer file of the model into its folder"
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
    /// The file holds GLM-4's byte-level ranks.
    #[error(
        "{path}: this is a list of base64 tokens and ranks (GLM-4), not a SentencePiece model; GLM-4 is not supported"
    )]
    Tiktoken {
        /// The file.
        path: PathBuf,
    },
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
    /// Something that this generation does not define.
    #[error("{what} is defined for {defined_for} only")]
    NotInGeneration {
        /// What was asked for.
        what: &'static str,
        /// Who has it.
        defined_for: &'static str,
    },
}

/// The tokenizer of one model.
#[derive(Clone, Debug)]
pub struct GlmTokenizer {
    model: Arc<SentencePiece>,
    generation: Generation,
    num_image_tokens: u32,
    special: SpecialIds,
    special_text: SpecialText,
}

impl GlmTokenizer {
    /// ChatGLM-6B's tokenizer from `ice_text.model` of any era; the pieces that the oldest file
    /// lacks are appended.
    ///
    /// # Errors
    /// [`TokenizerError::SentencePiece`] for a model that breaks a rule,
    /// [`TokenizerError::MissingPiece`] for one that is not ChatGLM-6B's.
    pub fn chatglm(mut proto: ModelProto, num_image_tokens: u32) -> Result<Self, TokenizerError> {
        let appended = append_chatglm_pieces(&mut proto)?;
        let model = SentencePiece::new(proto)?;
        let era = match (num_image_tokens, appended) {
            (0, _) => Era::C,
            (_, true) => Era::A,
            (_, false) => Era::B,
        };
        let special = SpecialIds::of_chatglm(&model, num_image_tokens)?;
        Ok(Self {
            special_text: SpecialText::new(era, &model, num_image_tokens),
            generation: Generation::ChatGlm(era),
            num_image_tokens,
            special,
            model: Arc::new(model),
        })
    }

    /// ChatGLM2's tokenizer from its `tokenizer.model`.
    ///
    /// # Errors
    /// As [`GlmTokenizer::chatglm`].
    pub fn chatglm2(proto: ModelProto) -> Result<Self, TokenizerError> {
        Self::numbered(proto, Generation::ChatGlm2)
    }

    /// ChatGLM3's tokenizer from its `tokenizer.model`.
    ///
    /// # Errors
    /// As [`GlmTokenizer::chatglm`].
    pub fn chatglm3(proto: ModelProto) -> Result<Self, TokenizerError> {
        Self::numbered(proto, Generation::ChatGlm3)
    }

    fn numbered(proto: ModelProto, generation: Generation) -> Result<Self, TokenizerError> {
        let model = SentencePiece::new(proto)?;
        Ok(Self {
            special: SpecialIds::numbered(&model, generation)?,
            special_text: SpecialText::none(),
            generation,
            num_image_tokens: 0,
            model: Arc::new(model),
        })
    }

    /// Which family and era this is.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// What every text id is shifted by.
    pub fn num_image_tokens(&self) -> u32 {
        self.num_image_tokens
    }

    /// The ids of the special tokens, shift included.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// The SentencePiece model inside.
    pub fn sentence_piece(&self) -> &Arc<SentencePiece> {
        &self.model
    }

    /// First id above all that this tokenizer makes.
    pub fn size(&self) -> u32 {
        self.num_image_tokens + self.model.proto().pieces.len() as u32 + self.special.numbered
    }

    /// The ids of `text`, no special tokens around them. Text that looks like one stays text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match self.generation {
            Generation::ChatGlm(_) => {
                let mut ids = self.model.encode(&text::to_pieces(text));
                self.shift(&mut ids);
                ids
            }
            Generation::ChatGlm2 | Generation::ChatGlm3 => self.model.encode(text),
        }
    }

    /// The ids of `text`, literal special tokens treated as told.
    pub fn encode_with(&self, text: &str, literal: LiteralSpecials) -> Vec<u32> {
        match literal {
            LiteralSpecials::AsText => self.encode(text),
            LiteralSpecials::AsReference => {
                let mut ids = Vec::new();
                for part in self.special_text.split(text) {
                    match part {
                        special::Part::Special(id) => ids.push(id),
                        special::Part::Text(text) => ids.extend(self.encode(text)),
                    }
                }
                ids
            }
        }
    }

    /// The ids of `text` as a continuation: without the space that is otherwise put in front.
    ///
    /// # Errors
    /// [`TokenizerError::NotInGeneration`] unless it is ChatGLM-6B's.
    pub fn encode_without_dummy_prefix(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let Generation::ChatGlm(_) = self.generation else {
            return Err(TokenizerError::NotInGeneration {
                what: "encoding without a dummy prefix",
                defined_for: "ChatGLM-6B",
            });
        };
        let behind_newline = format!("{}{}", text::NEWLINE, text::to_pieces(text));
        let mut ids = self.model.encode(&behind_newline);
        // The dummy prefix and the newline piece.
        ids.drain(..ids.len().min(2));
        self.shift(&mut ids);
        Ok(ids)
    }

    fn shift(&self, ids: &mut [u32]) {
        for id in ids {
            *id += self.num_image_tokens;
        }
    }

    /// The text of ids; special tokens and image tokens vanish.
    ///
    /// # Errors
    /// [`TokenizerError::IdOutOfRange`] for an id at or above [`GlmTokenizer::size`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        let size = self.size();
        if let Some(&id) = ids.iter().find(|&&id| id >= size) {
            return Err(TokenizerError::IdOutOfRange { id, size });
        }
        let pieces = self.model.proto().pieces.len() as u32;
        let text_ids: Vec<u32> = ids
            .iter()
            .filter_map(|id| id.checked_sub(self.num_image_tokens))
            .filter(|&id| id < pieces)
            .collect();
        let text = self.model.decode(&text_ids)?;
        Ok(match self.generation {
            Generation::ChatGlm(_) => text::from_pieces(&text),
            Generation::ChatGlm2 | Generation::ChatGlm3 => text,
        })
    }

    /// The text that the Hugging Face tokenizer of the era decodes to: eras A and B leave padding
    /// out; era C (since 8 May 2023) closes up spaces before English punctuation, which changes
    /// code and spaced text.
    ///
    /// # Errors
    /// As [`GlmTokenizer::decode`].
    pub fn decode_as_reference(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        match self.generation {
            Generation::ChatGlm(Era::A | Era::B) => {
                let mut kept = ids.to_vec();
                kept.retain(|&id| id != self.special.pad);
                self.decode(&kept)
            }
            Generation::ChatGlm(Era::C) => Ok(text::clean_up(&self.decode(ids)?)),
            Generation::ChatGlm2 | Generation::ChatGlm3 => self.decode(ids),
        }
    }

    /// The id of a token by name: a piece, a special, or `<image_k>`.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        if let Some(id) = self.image_id(token) {
            return Some(id);
        }
        if let Some(id) = self.special.numbered_id(token) {
            return Some(id);
        }
        Some(self.model.piece_to_id(token)? + self.num_image_tokens)
    }

    /// The name of an id: a piece, a special, or `<image_k>`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        let Some(piece) = id.checked_sub(self.num_image_tokens) else {
            return Some(format!("<image_{id}>"));
        };
        match self.model.id_to_piece(piece) {
            Some(piece) => Some(piece.text.clone()),
            None => self.special.numbered_name(id).map(str::to_owned),
        }
    }

    fn image_id(&self, token: &str) -> Option<u32> {
        let digits = token.strip_prefix("<image_")?.strip_suffix('>')?;
        let id: u32 = digits.parse().ok()?;
        (id < self.num_image_tokens && id.to_string() == digits).then_some(id)
    }
}
