//! Text to token ids and labels.

use crate::data::rows::RawRow;
use crate::data::template::{RowText, Template, TemplateSettings};
use crate::data::tokenizer::{
    Generation, GlmTokenizer, InputRule, LiteralSpecials, TokenizerError,
};

/// Why rows cannot be made with these settings.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// A length that leaves no place for text.
    #[error("{setting} is {value}; it must be at least {least}")]
    TooShort {
        /// Name of the setting.
        setting: &'static str,
        /// Its value.
        value: usize,
        /// What it takes.
        least: usize,
    },
    /// A model whose rows look different.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// The rows that one row of text becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// One row of a pair, one or more of a document, none of a document that has no tokens.
    pub rows: Vec<RawRow>,
    /// Ids of the prompt that were cut off.
    pub prompt_ids_cut: usize,
    /// Ids of the answer that were cut off.
    pub answer_ids_cut: usize,
}

/// Makes ChatGLM-6B's training rows. It holds no state: rows may be encoded in parallel.
#[derive(Clone, Copy, Debug)]
pub struct RowEncoder<'a> {
    tokenizer: &'a GlmTokenizer,
    settings: &'a TemplateSettings,
    literal: LiteralSpecials,
}

const NO_TARGET: i64 = -100;

impl<'a> RowEncoder<'a> {
    /// An encoder by these settings.
    ///
    /// # Errors
    /// Lengths that leave no place for text; a tokenizer that is not ChatGLM-6B's.
    pub fn new(
        tokenizer: &'a GlmTokenizer,
        settings: &'a TemplateSettings,
    ) -> Result<Self, EncodeError> {
        let Generation::ChatGlm(_) = tokenizer.generation() else {
            return Err(EncodeError::Tokenizer(TokenizerError::NotInGeneration {
                what: "making training rows of text",
                defined_for: "ChatGLM-6B",
            }));
        };
        // One id of text beside the special tokens.
        let lengths = match &settings.template {
            Template::PlainText(plain) => vec![("max_length", plain.max_length, 4)],
            _ => vec![
                ("max_source_length", settings.max_source_length, 2),
                ("max_target_length", settings.max_target_length, 3),
            ],
        };
        for (setting, value, least) in lengths {
            if value < least {
                return Err(EncodeError::TooShort {
                    setting,
                    value,
                    least,
                });
            }
        }
        Ok(Self {
            tokenizer,
            settings,
            literal: match settings.parse_special {
                true => LiteralSpecials::AsReference,
                false => LiteralSpecials::AsText,
            },
        })
    }

    /// The rows of one row of text.
    pub fn encode(&self, text: &RowText) -> Encoded {
        match text {
            RowText::Pair { prompt, answer } => self.pair(prompt, answer),
            RowText::Document { text, begins, ends } => Encoded {
                rows: self.document(text, *begins, *ends),
                ..Encoded::default()
            },
        }
    }

    /// prompt, `[gMASK]`, sop, answer, eop; from sop on every id is a target, but for padding.
    fn pair(&self, prompt: &str, answer: &str) -> Encoded {
        let prompt = format!("{}{prompt}", self.settings.source_prefix);
        let mut prompt = self.tokenizer.encode_with(&prompt, self.literal);
        let mut answer = self.tokenizer.encode_with(answer, self.literal);
        let prompt_ids_cut = cut(&mut prompt, self.settings.max_source_length - 1);
        let answer_ids_cut = cut(&mut answer, self.settings.max_target_length - 2);
        // The form of training rows is the same in all eras, unlike that of prompts.
        let ids = self
            .tokenizer
            .build_inputs_by(InputRule::Always, &prompt, Some(&answer));
        let special = self.tokenizer.special();
        let sop = ids.iter().position(|&id| id == special.sop);
        let label = |(index, &id): (usize, &u32)| match sop {
            Some(sop) if index >= sop && id != special.pad => i64::from(id),
            _ => NO_TARGET,
        };
        Encoded {
            rows: vec![RawRow {
                labels: ids.iter().enumerate().map(label).collect(),
                input_ids: ids.into_iter().map(i64::from).collect(),
                ..RawRow::default()
            }],
            prompt_ids_cut,
            answer_ids_cut,
        }
    }

    /// Chunk by chunk: `[gMASK]`, sop, the chunk, and behind the last one eop; the ids of the chunk
    /// and eop are targets.
    fn document(&self, text: &str, begins: bool, ends: bool) -> Vec<RawRow> {
        let ids = match (begins, self.literal) {
            // What goes on in the middle of a document has no space put in front.
            (false, LiteralSpecials::AsText) => self
                .tokenizer
                .encode_without_dummy_prefix(text)
                .unwrap_or_else(|_| self.tokenizer.encode(text)),
            _ => self.tokenizer.encode_with(text, self.literal),
        };
        let Template::PlainText(plain) = &self.settings.template else {
            return Vec::new();
        };
        let special = self.tokenizer.special();
        let size = plain.max_length - 3;
        let chunks = ids.len().div_ceil(size);
        let row = |(index, chunk): (usize, &[u32])| {
            let eop = (ends && index + 1 == chunks).then_some(special.eop);
            let targets = || chunk.iter().copied().chain(eop);
            let target = |id| match id == special.pad {
                true => NO_TARGET,
                false => i64::from(id),
            };
            let specials = [special.gmask, special.sop];
            let ids = specials.into_iter().chain(targets());
            RawRow {
                input_ids: ids.map(i64::from).collect(),
                labels: [NO_TARGET; 2]
                    .into_iter()
                    .chain(targets().map(target))
                    .collect(),
                ..RawRow::default()
            }
        };
        ids.chunks(size).enumerate().map(row).collect()
    }
}

/// Cuts a list; by how much.
fn cut(ids: &mut Vec<u32>, most: usize) -> usize {
    let cut = ids.len().saturating_sub(most);
    ids.truncate(most);
    cut
}
