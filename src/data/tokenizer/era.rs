//! Whether a tokenizer and a model belong together.
//!
//! ChatGLM-6B's ids moved by 20,000 in April 2023, and the mixture that hurts most raises no error
//! anywhere: a new tokenizer on an old checkpoint makes every text id 20,000 too low.

use std::fmt;

use super::special::{GLM4_ROLES_FROM, ROLES_FROM, glm4_specials};
use super::text::NEWLINE;
use super::{Era, Generation};
use crate::config::architecture::Naming;
use crate::config::model::ModelConfig;
use crate::data::byte_level::Tokens;
use crate::data::sentencepiece::ModelProto;

/// What the original code takes when `tokenizer_config.json` names no number.
const DEFAULT_IMAGE_TOKENS: u32 = 20_000;
/// More unused embedding rows than this mean that the parts do not belong together (real: 184 in
/// ChatGLM-6B, 235 in ChatGLM2, 209 in GLM-4).
const MAX_SPARE_ROWS: usize = 1024;
/// Pieces that era A's code appends at load.
const APPENDED_PIECES: usize = 344;

/// `vocab_size` of the original ChatGLM2 and 3, which goes with no other tokenizer.
const CHATGLM2_ROWS: usize = 65_024;
/// `vocab_size` of the original GLM-4.
const GLM4_ROWS: usize = 151_552;

/// Tokenizers that share a file format and special tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// SentencePiece with a newline piece.
    ChatGlm,
    /// SentencePiece with special tokens behind its pieces.
    ChatGlm2,
    /// Byte-level tokens.
    Glm4,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ChatGlm => "ChatGLM-6B",
            Self::ChatGlm2 => "ChatGLM2 or ChatGLM3",
            Self::Glm4 => "GLM-4",
        })
    }
}

/// What the model's `config.json` says about ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigIds {
    /// Which tokenizers it may have; all if empty.
    pub families: Vec<Family>,
    /// `vocab_size`; `padded_vocab_size` in ChatGLM2 and 3.
    pub vocab_size: usize,
    /// `bos_token_id`
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`, one or several.
    pub eos_token_ids: Vec<u32>,
    /// `mask_token_id`
    pub mask_token_id: Option<u32>,
    /// `gmask_token_id`
    pub gmask_token_id: Option<u32>,
    /// `pad_token_id`
    pub pad_token_id: Option<u32>,
}

impl From<&ModelConfig> for ConfigIds {
    fn from(config: &ModelConfig) -> Self {
        let families = match (config.architecture.naming, config.vocab_size) {
            (Naming::ChatGlm, _) => vec![Family::ChatGlm],
            (Naming::ChatGlm2, CHATGLM2_ROWS) => vec![Family::ChatGlm2],
            (Naming::Glm, _) | (Naming::ChatGlm2, GLM4_ROWS) => vec![Family::Glm4],
            (Naming::ChatGlm2, _) => vec![Family::ChatGlm2, Family::Glm4],
        };
        Self {
            families,
            vocab_size: config.vocab_size,
            bos_token_id: config.context_ids.map(|ids| ids.bos_token_id),
            eos_token_ids: config.eos_token_ids.clone(),
            mask_token_id: config.context_ids.map(|ids| ids.mask_token_id),
            gmask_token_id: config.context_ids.map(|ids| ids.gmask_token_id),
            pad_token_id: config.pad_token_id,
        }
    }
}

/// What a tokenizer's files say about ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFacts {
    /// Which tokenizer it is.
    pub family: Family,
    /// Number of ids without any shift: those included that era A's code appends, and the specials
    /// that are numbered behind the vocabulary.
    pub ids: usize,
    /// Whether the specials are missing in the file and will be appended (era A).
    pub appends_pieces: bool,
    /// `num_image_tokens` of `tokenizer_config.json`, where given.
    pub num_image_tokens: Option<u32>,
    /// Of ChatGLM2 and 3, which have the same file: whether anything beside it says that there are
    /// role tokens.
    pub has_roles: Option<bool>,
    /// Ids, without any shift, of the tokens that `config.json` repeats: config key, token, id.
    tokens: Vec<(&'static str, &'static str, u32)>,
    /// As `tokens`, of what may end an answer; any of these may stand in `eos_token_id`.
    ends: Vec<(&'static str, u32)>,
}

/// The outcome of agreeing checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EraVerdict {
    /// What to shift ids by.
    pub num_image_tokens: u32,
    /// Which tokenizer to build.
    pub generation: Generation,
    /// Worth a line to the user.
    pub warnings: Vec<EraWarning>,
}

/// Something odd that does no harm by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EraWarning {
    /// The number is missing and the default cannot be meant.
    #[error(
        "tokenizer_config.json names no num_image_tokens; 0 is taken, since ids shifted by {DEFAULT_IMAGE_TOKENS} would not fit the model's vocab_size {vocab_size} (write `\"num_image_tokens\": 0` there to silence this)"
    )]
    ImageTokensAssumedZero {
        /// `vocab_size` of config.json.
        vocab_size: usize,
    },
    /// The same file serves two generations, and nothing beside it tells which.
    #[error(
        "the tokenizer is that of ChatGLM2 or of ChatGLM3, which the files do not tell apart; ChatGLM2 is taken (for ChatGLM3 write `\"name_or_path\": \"THUDM/chatglm3-6b\"` into tokenizer_config.json, for ChatGLM2 `\"THUDM/chatglm2-6b\"` to silence this)"
    )]
    TakenForChatGlm2,
    /// config.json names no padding id.
    #[error("config.json names no pad_token_id; the tokenizer's {tokenizer} ({token}) is used")]
    PadMissing {
        /// The token that pads.
        token: &'static str,
        /// The tokenizer's id.
        tokenizer: u32,
    },
    /// config.json names another padding id.
    #[error(
        "config.json names pad_token_id {config}, but the tokenizer's {token} is {tokenizer}, which is used"
    )]
    PadDiffers {
        /// The id in config.json.
        config: u32,
        /// The token that pads.
        token: &'static str,
        /// The tokenizer's id.
        tokenizer: u32,
    },
}

/// Why a tokenizer and a model do not belong together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EraError {
    /// The checkpoint contradicts its own config.
    #[error(
        "the checkpoint's embedding has {embedding_rows} rows, but config.json says vocab_size {vocab_size}: config.json and weights are of different models or eras; take both from one place"
    )]
    EmbeddingRows {
        /// Rows of the embedding.
        embedding_rows: usize,
        /// `vocab_size` of config.json.
        vocab_size: usize,
    },
    /// The tokenizer's ids do not fit the model.
    #[error(
        "the tokenizer makes ids up to {last_id} (shifted by {num_image_tokens} image tokens), but the model has only {vocab_size}: an older tokenizer with a newer (slim) checkpoint; use the checkpoint's own ice_text.model and tokenizer_config.json"
    )]
    IdsBeyondVocabulary {
        /// The largest id.
        last_id: u64,
        /// The shift.
        num_image_tokens: u32,
        /// `vocab_size` of config.json.
        vocab_size: usize,
    },
    /// The silent mixture: no id is out of range, all are wrong.
    #[error(
        "the model (vocab_size {vocab_size}) expects ids shifted by {DEFAULT_IMAGE_TOKENS} image tokens, but tokenizer_config.json says num_image_tokens {num_image_tokens}: every text id would be {DEFAULT_IMAGE_TOKENS} too low, without any error; use the checkpoint's own tokenizer files, or a slim checkpoint"
    )]
    ShiftMissing {
        /// `vocab_size` of config.json.
        vocab_size: usize,
        /// The shift in the file.
        num_image_tokens: u32,
    },
    /// The tokenizer of another generation.
    #[error(
        "the tokenizer is that of {tokenizer}, but config.json (vocab_size {vocab_size}) describes a model of {}: use the tokenizer files (ice_text.model, tokenizer.model or tokenizer.json) that belong to the checkpoint",
        .models.iter().map(Family::to_string).collect::<Vec<_>>().join(" or ")
    )]
    Family {
        /// Whose tokenizer it is.
        tokenizer: Family,
        /// Whose model it may be.
        models: Vec<Family>,
        /// `vocab_size` of config.json.
        vocab_size: usize,
    },
    /// More ids than embedding rows, in a generation that has no eras.
    #[error(
        "the tokenizer has {tokenizer_size} ids, but the model only {vocab_size}: they are of different models; use the checkpoint's own tokenizer files"
    )]
    TooFewRows {
        /// Ids of the tokenizer.
        tokenizer_size: usize,
        /// `vocab_size` of config.json.
        vocab_size: usize,
    },
    /// Far more embedding rows than ids.
    #[error(
        "the model has {vocab_size} ids, but the tokenizer only {tokenizer_size} (shift {num_image_tokens}): they are of different models; use the checkpoint's own tokenizer files"
    )]
    SpareRows {
        /// `vocab_size` of config.json.
        vocab_size: usize,
        /// Ids of the tokenizer.
        tokenizer_size: usize,
        /// The shift.
        num_image_tokens: u32,
    },
    /// A special token has two ids.
    #[error(
        "config.json says {key} {config}, but the tokenizer's {token} is {tokenizer}: config.json and tokenizer are of different models or eras; take both from one place"
    )]
    SpecialId {
        /// Key in config.json.
        key: &'static str,
        /// The id there.
        config: u32,
        /// The token it should name.
        token: &'static str,
        /// The tokenizer's id, shift included.
        tokenizer: u32,
    },
}

impl TokenizerFacts {
    /// Collects the facts from a SentencePiece file and what stands beside it.
    pub fn new(proto: &ModelProto, num_image_tokens: Option<u32>, has_roles: Option<bool>) -> Self {
        let find = |text: &str| {
            let position = proto.pieces.iter().position(|piece| piece.text == text);
            position.map(|id| id as u32)
        };
        let in_file = proto.pieces.len() as u32;
        if find(NEWLINE).is_none() {
            return Self::of_chatglm2(in_file, find, has_roles);
        }
        let appends_pieces = find("[gMASK]").is_none();
        let special = |text, index| match appends_pieces {
            true => Some(in_file + index),
            false => find(text),
        };
        let named = [
            ("mask_token_id", "[MASK]", special("[MASK]", 0)),
            ("gmask_token_id", "[gMASK]", special("[gMASK]", 1)),
            ("bos_token_id", "<sop>", special("<sop>", 4)),
            ("pad_token_id", "<pad>", find("<pad>")),
        ];
        let ends = special("<eop>", 5).map(|id| ("<eop>", id));
        Self {
            family: Family::ChatGlm,
            ids: proto.pieces.len() + if appends_pieces { APPENDED_PIECES } else { 0 },
            appends_pieces,
            num_image_tokens,
            has_roles: None,
            tokens: present(named),
            ends: ends.into_iter().collect(),
        }
    }

    fn of_chatglm2(
        pieces: u32,
        find: impl Fn(&str) -> Option<u32>,
        has_roles: Option<bool>,
    ) -> Self {
        let named = [
            ("bos_token_id", "<s>", find("<s>")),
            ("mask_token_id", "[MASK]", Some(pieces)),
            ("gmask_token_id", "[gMASK]", Some(pieces + 1)),
            ("pad_token_id", "<pad>", find("<unk>")),
        ];
        let roles = pieces + ROLES_FROM;
        let ends = [
            find("</s>").map(|id| ("</s>", id)),
            Some(("<|user|>", roles + 1)),
            Some(("<|observation|>", roles + 3)),
        ];
        Self {
            family: Family::ChatGlm2,
            // Whether ChatGLM3's four more are used is another question.
            ids: roles as usize,
            appends_pieces: false,
            num_image_tokens: None,
            has_roles,
            tokens: present(named),
            ends: ends.into_iter().flatten().collect(),
        }
    }

    /// Collects the facts from GLM-4's tokens.
    pub fn of_tokens(tokens: &Tokens) -> Self {
        let first = tokens.tokens.len() as u32;
        let specials = match tokens.specials.len() {
            0 => glm4_specials(),
            named => named,
        };
        Self {
            family: Family::Glm4,
            ids: tokens.tokens.len() + specials,
            appends_pieces: false,
            num_image_tokens: None,
            has_roles: None,
            tokens: vec![("pad_token_id", "<|endoftext|>", first)],
            ends: vec![
                ("<|endoftext|>", first),
                ("<|user|>", first + GLM4_ROLES_FROM + 1),
                ("<|observation|>", first + GLM4_ROLES_FROM + 3),
            ],
        }
    }

    /// Compares the tokenizer with the model: `config.json` and, where known, the number of rows
    /// of the checkpoint's embedding.
    ///
    /// # Errors
    /// One for each way in which they can disagree.
    pub fn check(
        &self,
        config: &ConfigIds,
        embedding_rows: Option<usize>,
    ) -> Result<EraVerdict, EraError> {
        let vocab_size = config.vocab_size;
        if let Some(embedding_rows) = embedding_rows.filter(|&rows| rows != vocab_size) {
            return Err(EraError::EmbeddingRows {
                embedding_rows,
                vocab_size,
            });
        }
        if !config.families.is_empty() && !config.families.contains(&self.family) {
            return Err(EraError::Family {
                tokenizer: self.family,
                models: config.families.clone(),
                vocab_size,
            });
        }
        let mut warnings = Vec::new();
        let shift = self.shift(vocab_size, &mut warnings)?;
        for &(key, token, id) in &self.tokens {
            let tokenizer = id.saturating_add(shift);
            let in_config = match key {
                "mask_token_id" => config.mask_token_id,
                "gmask_token_id" => config.gmask_token_id,
                "bos_token_id" => config.bos_token_id,
                _ => {
                    warnings.extend(pad_warning(token, config.pad_token_id, tokenizer));
                    continue;
                }
            };
            if let Some(config) = in_config.filter(|&config| config != tokenizer) {
                return Err(EraError::SpecialId {
                    key,
                    config,
                    token,
                    tokenizer,
                });
            }
        }
        self.check_ends(config, shift)?;
        let generation = match self.family {
            Family::ChatGlm => Generation::ChatGlm(match (shift, self.appends_pieces) {
                (0, _) => Era::C,
                (_, true) => Era::A,
                (_, false) => Era::B,
            }),
            Family::ChatGlm2 => self.chatglm2_or_3(config, &mut warnings),
            Family::Glm4 => Generation::Glm4,
        };
        Ok(EraVerdict {
            num_image_tokens: shift,
            generation,
            warnings,
        })
    }

    /// Every `eos_token_id` must be one of the tokens that may end an answer.
    fn check_ends(&self, config: &ConfigIds, shift: u32) -> Result<(), EraError> {
        let Some(&(token, first)) = self.ends.first() else {
            return Ok(());
        };
        let ends = |id: u32| {
            let mut ends = self.ends.iter();
            ends.any(|(_, end)| end.saturating_add(shift) == id)
        };
        match config.eos_token_ids.iter().find(|&&id| !ends(id)) {
            None => Ok(()),
            Some(&config) => Err(EraError::SpecialId {
                key: "eos_token_id",
                config,
                token,
                tokenizer: first.saturating_add(shift),
            }),
        }
    }

    /// Role tokens that end an answer by `config.json`, or else what stands beside the file.
    fn chatglm2_or_3(&self, config: &ConfigIds, warnings: &mut Vec<EraWarning>) -> Generation {
        let mut roles = self.ends.iter().skip(1);
        let ends_with_roles = roles.any(|(_, id)| config.eos_token_ids.contains(id));
        match (ends_with_roles, self.has_roles) {
            (true, _) | (_, Some(true)) => Generation::ChatGlm3,
            (_, Some(false)) => Generation::ChatGlm2,
            (_, None) => {
                warnings.push(EraWarning::TakenForChatGlm2);
                Generation::ChatGlm2
            }
        }
    }

    /// The shift under which tokenizer and model fit each other.
    fn shift(&self, vocab_size: usize, warnings: &mut Vec<EraWarning>) -> Result<u32, EraError> {
        let has_eras = self.family == Family::ChatGlm;
        let shift = match self.num_image_tokens {
            _ if !has_eras => 0,
            Some(given) => given,
            None if self.fits(0, vocab_size) => {
                warnings.push(EraWarning::ImageTokensAssumedZero { vocab_size });
                0
            }
            None => DEFAULT_IMAGE_TOKENS,
        };
        if self.fits(shift, vocab_size) {
            return Ok(shift);
        }
        let size = self.size(shift);
        Err(if size > vocab_size && !has_eras {
            EraError::TooFewRows {
                tokenizer_size: size,
                vocab_size,
            }
        } else if size > vocab_size {
            EraError::IdsBeyondVocabulary {
                last_id: size as u64 - 1,
                num_image_tokens: shift,
                vocab_size,
            }
        } else if has_eras && self.fits(DEFAULT_IMAGE_TOKENS, vocab_size) {
            EraError::ShiftMissing {
                vocab_size,
                num_image_tokens: shift,
            }
        } else {
            EraError::SpareRows {
                vocab_size,
                tokenizer_size: size,
                num_image_tokens: shift,
            }
        })
    }

    fn size(&self, shift: u32) -> usize {
        self.ids + shift as usize
    }

    fn fits(&self, shift: u32, vocab_size: usize) -> bool {
        vocab_size
            .checked_sub(self.size(shift))
            .is_some_and(|spare| spare < MAX_SPARE_ROWS)
    }
}

/// Those of the named tokens that the file has.
fn present<const N: usize>(
    named: [(&'static str, &'static str, Option<u32>); N],
) -> Vec<(&'static str, &'static str, u32)> {
    let named = named.into_iter();
    let found = named.filter_map(|(key, token, id)| Some((key, token, id?)));
    found.collect()
}

fn pad_warning(token: &'static str, config: Option<u32>, tokenizer: u32) -> Option<EraWarning> {
    match config {
        None => Some(EraWarning::PadMissing { token, tokenizer }),
        Some(config) if config != tokenizer => Some(EraWarning::PadDiffers {
            config,
            token,
            tokenizer,
        }),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests;
