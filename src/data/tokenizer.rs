//! The tokenizers of all generations: a vocabulary plus what surrounds it.
//!
//! ChatGLM-6B wraps text in whitespace pieces, shifts ids by the number of image tokens and has
//! its special tokens in its SentencePiece vocabulary; ChatGLM2 and 3 number theirs behind it, and
//! so does GLM-4 behind its byte-level tokens.

use std::fmt;
use std::sync::Arc;

use super::byte_level::{ByteLevel, Tokens};
use super::sentencepiece::{ModelProto, SentencePiece};

mod conversation;
mod era;
mod error;
mod files;
mod inputs;
mod rounds;
mod special;
mod text;

pub use conversation::{ChatMessage, ChatRole, ConversationIds, ConversationProblem};
pub use era::{ConfigIds, EraError, EraVerdict, EraWarning, Family, TokenizerFacts};
pub use error::TokenizerError;
pub use files::{TokenizerFiles, VocabularyFile};
pub use inputs::InputRule;
pub use rounds::RoundStyle;
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
    /// GLM-4-9B: byte-level tokens, role tokens.
    Glm4,
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ChatGlm(_) => "ChatGLM-6B",
            Self::ChatGlm2 => "ChatGLM2",
            Self::ChatGlm3 => "ChatGLM3",
            Self::Glm4 => "GLM-4",
        })
    }
}

/// What happens to text that looks like a special token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LiteralSpecials {
    /// It stays text: right for what users write.
    #[default]
    AsText,
    /// It becomes the special id, as in the Hugging Face tokenizers of each generation: in
    /// ChatGLM-6B's whitespace beside it vanishes, in GLM-4's not; ChatGLM2 and 3 split nothing.
    AsReference,
}

/// Pieces or byte-level tokens.
#[derive(Clone, Debug)]
enum Vocabulary {
    SentencePiece(Arc<SentencePiece>),
    ByteLevel(Arc<ByteLevel>),
}

/// The tokenizer of one model.
#[derive(Clone, Debug)]
pub struct GlmTokenizer {
    vocabulary: Vocabulary,
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
            special_text: SpecialText::of_chatglm(era, &model, num_image_tokens),
            generation: Generation::ChatGlm(era),
            num_image_tokens,
            special,
            vocabulary: Vocabulary::SentencePiece(Arc::new(model)),
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
            special: SpecialIds::of_chatglm2(&model, generation)?,
            special_text: SpecialText::default(),
            generation,
            num_image_tokens: 0,
            vocabulary: Vocabulary::SentencePiece(Arc::new(model)),
        })
    }

    /// The tokenizer of a generation that has a SentencePiece model.
    fn of_proto(
        proto: ModelProto,
        generation: Generation,
        num_image_tokens: u32,
    ) -> Result<Self, TokenizerError> {
        match generation {
            Generation::ChatGlm(_) => Self::chatglm(proto, num_image_tokens),
            _ => Self::numbered(proto, generation),
        }
    }

    /// GLM-4's tokenizer from its `tokenizer.model` (tiktoken's ranks) or `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::ByteLevel`] for tokens that make no vocabulary,
    /// [`TokenizerError::MissingSpecial`] for a file that is not GLM-4's.
    pub fn glm4(tokens: Tokens) -> Result<Self, TokenizerError> {
        let special = SpecialIds::of_glm4(tokens.tokens.len() as u32, &tokens.specials)?;
        Ok(Self {
            special_text: SpecialText::of_glm4(&special),
            special,
            generation: Generation::Glm4,
            num_image_tokens: 0,
            vocabulary: Vocabulary::ByteLevel(Arc::new(ByteLevel::new(tokens)?)),
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

    /// The SentencePiece model inside, but for GLM-4.
    pub fn sentence_piece(&self) -> Option<&Arc<SentencePiece>> {
        match &self.vocabulary {
            Vocabulary::SentencePiece(model) => Some(model),
            Vocabulary::ByteLevel(_) => None,
        }
    }

    /// Bytes to tell vocabularies apart by.
    pub fn vocabulary_bytes(&self) -> Vec<u8> {
        match &self.vocabulary {
            Vocabulary::SentencePiece(model) => model.proto().to_bytes(),
            Vocabulary::ByteLevel(model) => model.tokens().to_bytes(),
        }
    }

    /// Number of pieces or tokens, specials behind them not counted.
    fn pieces(&self) -> u32 {
        (match &self.vocabulary {
            Vocabulary::SentencePiece(model) => model.proto().pieces.len(),
            Vocabulary::ByteLevel(model) => model.tokens().tokens.len(),
        }) as u32
    }

    /// First id above all that this tokenizer makes.
    pub fn size(&self) -> u32 {
        self.num_image_tokens + self.pieces() + self.special.count()
    }

    /// The ids of `text`, no special tokens around them. Text that looks like one stays text.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match (&self.vocabulary, self.generation) {
            (Vocabulary::SentencePiece(model), Generation::ChatGlm(_)) => {
                let mut ids = model.encode(&text::to_pieces(text));
                self.shift(&mut ids);
                ids
            }
            (Vocabulary::SentencePiece(model), _) => model.encode(text),
            (Vocabulary::ByteLevel(model), _) => model.encode(text),
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
    /// [`TokenizerError::NotInGeneration`] for ChatGLM2 and 3.
    pub fn encode_without_dummy_prefix(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match (&self.vocabulary, self.generation) {
            (Vocabulary::SentencePiece(model), Generation::ChatGlm(_)) => {
                let behind_newline = format!("{}{}", text::NEWLINE, text::to_pieces(text));
                let mut ids = model.encode(&behind_newline);
                // The dummy prefix and the newline piece.
                ids.drain(..ids.len().min(2));
                self.shift(&mut ids);
                Ok(ids)
            }
            (Vocabulary::SentencePiece(_), _) => Err(TokenizerError::NotInGeneration {
                what: "encoding without a dummy prefix",
                defined_for: "ChatGLM-6B and GLM-4",
            }),
            (Vocabulary::ByteLevel(model), _) => Ok(model.encode(text)),
        }
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
        let pieces = self.pieces();
        let text_ids: Vec<u32> = ids
            .iter()
            .filter_map(|id| id.checked_sub(self.num_image_tokens))
            .filter(|&id| id < pieces)
            .collect();
        Ok(match (&self.vocabulary, self.generation) {
            (Vocabulary::SentencePiece(model), Generation::ChatGlm(_)) => {
                text::from_pieces(&model.decode(&text_ids)?)
            }
            (Vocabulary::SentencePiece(model), _) => model.decode(&text_ids)?,
            (Vocabulary::ByteLevel(model), _) => {
                String::from_utf8_lossy(&model.decode(&text_ids)).into_owned()
            }
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
            Generation::ChatGlm2 | Generation::ChatGlm3 | Generation::Glm4 => self.decode(ids),
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
        let id = match &self.vocabulary {
            Vocabulary::SentencePiece(model) => model.piece_to_id(token),
            Vocabulary::ByteLevel(model) => model.token_to_id(token.as_bytes()),
        };
        Some(id? + self.num_image_tokens)
    }

    /// The name of an id: a piece, a special, or `<image_k>`.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        let Some(piece) = id.checked_sub(self.num_image_tokens) else {
            return Some(format!("<image_{id}>"));
        };
        if let Some(name) = self.special.numbered_name(id) {
            return Some(name.to_owned());
        }
        match &self.vocabulary {
            Vocabulary::SentencePiece(model) => Some(model.id_to_piece(piece)?.text.clone()),
            Vocabulary::ByteLevel(model) => {
                let token = model.tokens().tokens.get(piece as usize)?;
                Some(String::from_utf8_lossy(token).into_owned())
            }
        }
    }

    fn image_id(&self, token: &str) -> Option<u32> {
        let digits = token.strip_prefix("<image_")?.strip_suffix('>')?;
        let id: u32 = digits.parse().ok()?;
        (id < self.num_image_tokens && id.to_string() == digits).then_some(id)
    }
}
