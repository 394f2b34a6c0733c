//! Whether a tokenizer and a model belong together.
//!
//! ChatGLM-6B's ids moved by 20,000 in April 2023, and the mixture that hurts most raises no error
//! anywhere: a new tokenizer on an old checkpoint makes every text id 20,000 too low.

use super::Era;
use super::text::NEWLINE;
use crate::config::model::ModelConfig;
use crate::data::sentencepiece::ModelProto;

/// What the original code takes when `tokenizer_config.json` names no number.
const DEFAULT_IMAGE_TOKENS: u32 = 20_000;
/// More unused embedding rows than this mean that the parts do not belong together (real: 184 in
/// ChatGLM-6B, 235 in ChatGLM2).
const MAX_SPARE_ROWS: usize = 1024;
/// Pieces that era A's code appends at load.
const APPENDED_PIECES: usize = 344;

/// What the model's `config.json` says about ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigIds {
    /// `vocab_size`; `padded_vocab_size` in ChatGLM2 and 3.
    pub vocab_size: usize,
    /// `bos_token_id`
    pub bos_token_id: Option<u32>,
    /// `eos_token_id`
    pub eos_token_id: Option<u32>,
    /// `mask_token_id`
    pub mask_token_id: Option<u32>,
    /// `gmask_token_id`
    pub gmask_token_id: Option<u32>,
    /// `pad_token_id`
    pub pad_token_id: Option<u32>,
}

impl From<&ModelConfig> for ConfigIds {
    fn from(config: &ModelConfig) -> Self {
        Self {
            vocab_size: config.vocab_size,
            bos_token_id: config.context_ids.map(|ids| ids.bos_token_id),
            eos_token_id: config.eos_token_ids.first().copied(),
            mask_token_id: config.context_ids.map(|ids| ids.mask_token_id),
            gmask_token_id: config.context_ids.map(|ids| ids.gmask_token_id),
            pad_token_id: config.pad_token_id,
        }
    }
}

/// What a tokenizer's files say about ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenizerFacts {
    /// Number of pieces, those included that era A's code appends.
    pub pieces: usize,
    /// Whether it is ChatGLM-6B's: it has a newline piece.
    pub is_chatglm: bool,
    /// Whether the specials are missing in the file and will be appended (era A).
    pub appends_pieces: bool,
    /// `num_image_tokens` of `tokenizer_config.json`, where given.
    pub num_image_tokens: Option<u32>,
    /// Piece ids, without any shift, of the tokens whose ids `config.json` repeats: config key,
    /// token, id.
    tokens: Vec<(&'static str, &'static str, u32)>,
}

/// The outcome of agreeing checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EraVerdict {
    /// What to shift ids by.
    pub num_image_tokens: u32,
    /// The era of ChatGLM-6B's tokenizer; `None` for ChatGLM2 and 3.
    pub era: Option<Era>,
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
    /// config.json names no padding id.
    #[error("config.json names no pad_token_id; the tokenizer's {tokenizer} (<pad>) is used")]
    PadMissing {
        /// The tokenizer's id.
        tokenizer: u32,
    },
    /// config.json names another padding id.
    #[error(
        "config.json names pad_token_id {config}, but the tokenizer's <pad> is {tokenizer}, which is used"
    )]
    PadDiffers {
        /// The id in config.json.
        config: u32,
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
        "config.json says {key} {config}, but the tokenizer's {token} is {tokenizer}: config.json and tokenizer are of different eras; take both from one place"
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
    /// Collects the facts from a SentencePiece file and the number in `tokenizer_config.json`.
    pub fn new(proto: &ModelProto, num_image_tokens: Option<u32>) -> Self {
        let find = |text: &str| proto.pieces.iter().position(|piece| piece.text == text);
        let is_chatglm = find(NEWLINE).is_some();
        let in_file = proto.pieces.len();
        let appends_pieces = is_chatglm && find("[gMASK]").is_none();
        let mut tokens = Vec::new();
        let mut name = |key, token, id: Option<usize>| {
            if let Some(id) = id {
                tokens.push((key, token, id as u32));
            }
        };
        if is_chatglm {
            let special = |text, index| {
                if appends_pieces {
                    Some(in_file + index)
                } else {
                    find(text)
                }
            };
            name("mask_token_id", "[MASK]", special("[MASK]", 0));
            name("gmask_token_id", "[gMASK]", special("[gMASK]", 1));
            name("bos_token_id", "<sop>", special("<sop>", 4));
            name("eos_token_id", "<eop>", special("<eop>", 5));
            name("pad_token_id", "<pad>", find("<pad>"));
        } else {
            name("mask_token_id", "[MASK]", Some(in_file));
            name("gmask_token_id", "[gMASK]", Some(in_file + 1));
            name("bos_token_id", "<s>", find("<s>"));
            name("eos_token_id", "</s>", find("</s>"));
            name("pad_token_id", "<pad>", find("<unk>"));
        }
        Self {
            pieces: in_file + if appends_pieces { APPENDED_PIECES } else { 0 },
            is_chatglm,
            appends_pieces,
            num_image_tokens,
            tokens,
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
        let mut warnings = Vec::new();
        let shift = self.shift(vocab_size, &mut warnings)?;
        for &(key, token, id) in &self.tokens {
            let tokenizer = id.saturating_add(shift);
            let in_config = match key {
                "mask_token_id" => config.mask_token_id,
                "gmask_token_id" => config.gmask_token_id,
                "bos_token_id" => config.bos_token_id,
                "eos_token_id" => config.eos_token_id,
                _ => {
                    warnings.extend(pad_warning(config.pad_token_id, tokenizer));
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
        let era = match (shift, self.appends_pieces) {
            (0, _) => Era::C,
            (_, true) => Era::A,
            (_, false) => Era::B,
        };
        Ok(EraVerdict {
            num_image_tokens: shift,
            era: self.is_chatglm.then_some(era),
            warnings,
        })
    }

    /// The shift under which tokenizer and model fit each other.
    fn shift(&self, vocab_size: usize, warnings: &mut Vec<EraWarning>) -> Result<u32, EraError> {
        let shift = match self.num_image_tokens {
            _ if !self.is_chatglm => 0,
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
        Err(if size > vocab_size {
            EraError::IdsBeyondVocabulary {
                last_id: size as u64 - 1,
                num_image_tokens: shift,
                vocab_size,
            }
        } else if self.is_chatglm && self.fits(DEFAULT_IMAGE_TOKENS, vocab_size) {
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
        // ChatGLM2 has five specials behind its pieces; whether ChatGLM3's four more are used, the
        // file does not tell.
        let numbered = if self.is_chatglm { 0 } else { 5 };
        self.pieces + numbered + shift as usize
    }

    fn fits(&self, shift: u32, vocab_size: usize) -> bool {
        vocab_size
            .checked_sub(self.size(shift))
            .is_some_and(|spare| spare < MAX_SPARE_ROWS)
    }
}

fn pad_warning(config: Option<u32>, tokenizer: u32) -> Option<EraWarning> {
    match config {
        None => Some(EraWarning::PadMissing { tokenizer }),
        Some(config) if config != tokenizer => Some(EraWarning::PadDiffers { config, tokenizer }),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ChatGLM-6B's file, with the numbers of the original.
    fn chatglm(appends_pieces: bool, num_image_tokens: Option<u32>) -> TokenizerFacts {
        TokenizerFacts {
            pieces: 130_344,
            is_chatglm: true,
            appends_pieces,
            num_image_tokens,
            tokens: vec![
                ("mask_token_id", "[MASK]", 130_000),
                ("gmask_token_id", "[gMASK]", 130_001),
                ("bos_token_id", "<sop>", 130_004),
                ("eos_token_id", "<eop>", 130_005),
                ("pad_token_id", "<pad>", 3),
            ],
        }
    }

    fn config(vocab_size: usize, first: u32, pad: u32) -> ConfigIds {
        ConfigIds {
            vocab_size,
            bos_token_id: Some(first + 4),
            eos_token_id: Some(first + 5),
            mask_token_id: Some(first),
            gmask_token_id: Some(first + 1),
            pad_token_id: Some(pad),
        }
    }

    fn slim() -> ConfigIds {
        config(130_528, 130_000, 3)
    }

    fn old() -> ConfigIds {
        config(150_528, 150_000, 20_003)
    }

    #[test]
    fn the_three_eras_are_recognised() {
        let cases = [
            (chatglm(true, None), old(), Era::A, 20_000),
            (chatglm(true, Some(20_000)), old(), Era::A, 20_000),
            (chatglm(false, None), old(), Era::B, 20_000),
            (chatglm(false, Some(0)), slim(), Era::C, 0),
        ];
        for (facts, config, era, num_image_tokens) in cases {
            let verdict = EraVerdict {
                num_image_tokens,
                era: Some(era),
                warnings: vec![],
            };
            let rows = Some(config.vocab_size);
            assert_eq!(facts.check(&config, rows), Ok(verdict));
        }
    }

    #[test]
    fn every_mixture_is_refused_with_its_own_message() {
        let with = |change: fn(&mut ConfigIds)| {
            let mut config = slim();
            change(&mut config);
            config
        };
        let new = || chatglm(false, Some(0));
        let cases = [
            (
                new(),
                slim(),
                Some(150_528),
                "embedding has 150528 rows, but config.json says vocab_size 130528",
            ),
            (
                chatglm(true, Some(20_000)),
                slim(),
                None,
                "ids up to 150343 (shifted by 20000 image tokens), but the model has only 130528",
            ),
            (new(), old(), None, "every text id would be 20000 too low"),
            (
                new(),
                config(200_000, 0, 0),
                None,
                "the model has 200000 ids, but the tokenizer only 130344",
            ),
            (
                chatglm(false, Some(u32::MAX)),
                slim(),
                None,
                "ids up to 4295097638",
            ),
            (
                new(),
                with(|c| c.mask_token_id = Some(150_000)),
                None,
                "mask_token_id 150000, but the tokenizer's [MASK] is 130000",
            ),
            (
                new(),
                with(|c| c.gmask_token_id = Some(150_001)),
                None,
                "gmask_token_id 150001, but the tokenizer's [gMASK] is 130001",
            ),
            (
                new(),
                with(|c| c.bos_token_id = Some(150_004)),
                None,
                "bos_token_id 150004, but the tokenizer's <sop> is 130004",
            ),
            (
                new(),
                with(|c| c.eos_token_id = Some(150_005)),
                None,
                "eos_token_id 150005, but the tokenizer's <eop> is 130005",
            ),
        ];
        for (facts, config, rows, expected) in cases {
            let message = match facts.check(&config, rows) {
                Ok(verdict) => panic!("accepted: {verdict:?}"),
                Err(error) => error.to_string(),
            };
            assert!(
                message.contains(expected),
                "`{message}` says not `{expected}`"
            );
        }
    }

    #[test]
    fn what_does_no_harm_is_a_warning() {
        let mut config = slim();
        config.pad_token_id = None;
        let verdict = chatglm(false, None).check(&config, None);
        let warnings = vec![
            EraWarning::ImageTokensAssumedZero {
                vocab_size: 130_528,
            },
            EraWarning::PadMissing { tokenizer: 3 },
        ];
        assert_eq!(verdict.map(|verdict| verdict.warnings), Ok(warnings));
        config.pad_token_id = Some(20_003);
        let verdict = chatglm(false, Some(0)).check(&config, None);
        let differs = EraWarning::PadDiffers {
            config: 20_003,
            tokenizer: 3,
        };
        assert_eq!(verdict.map(|verdict| verdict.warnings), Ok(vec![differs]));
    }

    #[test]
    fn chatglm2_has_its_specials_behind_the_pieces() {
        let facts = TokenizerFacts {
            pieces: 64_789,
            is_chatglm: false,
            appends_pieces: false,
            num_image_tokens: None,
            tokens: vec![("eos_token_id", "</s>", 2), ("pad_token_id", "<pad>", 0)],
        };
        let mut config = ConfigIds {
            vocab_size: 65_024,
            eos_token_id: Some(2),
            pad_token_id: Some(0),
            ..ConfigIds::default()
        };
        let verdict = EraVerdict {
            num_image_tokens: 0,
            era: None,
            warnings: vec![],
        };
        assert_eq!(facts.check(&config, Some(65_024)), Ok(verdict));
        config.vocab_size = 150_528;
        let refused = facts.check(&config, None);
        assert!(
            matches!(refused, Err(EraError::SpareRows { .. })),
            "{refused:?}"
        );
    }
}
