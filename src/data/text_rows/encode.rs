//! Text to token ids and labels.

use serde::{Deserialize, Serialize};

use super::lengths::Lengths;
use crate::data::TextProblem;
use crate::data::rows::RawRow;
use crate::data::template::{RowText, Template, TemplateSettings, TrainOnTurns};
use crate::data::tokenizer::{
    ConversationIds, Generation, GlmTokenizer, LiteralSpecials, TokenizerError,
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
    /// A tokenizer without what rows are made of.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// The rows that one row of text becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// One row of a conversation, or one for each turn that is trained on; one or more of a document,
    /// none of a document that has no tokens.
    pub rows: Vec<RawRow>,
    /// What did not fit.
    pub cuts: Cuts,
}

/// What did not fit into rows of token ids, as numbers of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cuts {
    /// Rows whose prompt was cut.
    pub prompts: usize,
    /// Rows whose answer was cut.
    pub answers: usize,
    /// Rows whose oldest turns were dropped.
    pub turns: usize,
}

impl Cuts {
    /// Adds what did not fit elsewhere.
    pub fn add(&mut self, other: Self) {
        self.prompts += other.prompts;
        self.answers += other.answers;
        self.turns += other.turns;
    }

    /// What the user should know, a sentence each.
    pub(super) fn notices(self) -> Vec<String> {
        let counted = [
            (
                self.turns,
                "conversations are too long; their oldest turns are dropped (max_length, or \
                 max_source_length)",
            ),
            (
                self.prompts,
                "prompts are too long and are cut (max_source_length, of conversations max_length)",
            ),
            (
                self.answers,
                "answers are too long and are cut (max_target_length, of conversations max_length)",
            ),
        ];
        let counted = counted.iter().filter(|(count, _)| *count > 0);
        counted
            .map(|(count, what)| format!("{count} {what}"))
            .collect()
    }
}

/// Makes training rows. It holds no state: rows may be encoded in parallel.
#[derive(Clone, Copy, Debug)]
pub struct RowEncoder<'a> {
    pub(super) tokenizer: &'a GlmTokenizer,
    pub(super) settings: &'a TemplateSettings,
    pub(super) literal: LiteralSpecials,
    pub(super) lengths: Lengths,
}

const NO_TARGET: i64 = -100;

impl<'a> RowEncoder<'a> {
    /// An encoder by these settings.
    ///
    /// # Errors
    /// Lengths that leave no place for text.
    pub fn new(
        tokenizer: &'a GlmTokenizer,
        settings: &'a TemplateSettings,
    ) -> Result<Self, EncodeError> {
        let literal = match settings.parse_special {
            true => LiteralSpecials::AsReference,
            false => LiteralSpecials::AsText,
        };
        Ok(Self {
            lengths: Lengths::of(tokenizer, settings, literal)?,
            tokenizer,
            settings,
            literal,
        })
    }

    /// The rows of one row of text.
    ///
    /// # Errors
    /// A conversation that the model's generation has no form for, or no room.
    pub fn encode(&self, text: &RowText) -> Result<Encoded, TextProblem> {
        match text {
            RowText::Conversation(conversation) => {
                let encoded = match self.tokenizer.generation().rounds() {
                    Some(style) => self.in_rounds(style, conversation)?,
                    None => self.with_roles(conversation)?,
                };
                match encoded.rows.is_empty() {
                    true => Err(TextProblem::NotTrained),
                    false => Ok(encoded),
                }
            }
            RowText::Document { text, begins, ends } => Ok(Encoded {
                rows: self.document(text, *begins, *ends),
                ..Encoded::default()
            }),
        }
    }

    pub(super) fn encode_text(&self, text: &str) -> Vec<u32> {
        self.tokenizer.encode_with(text, self.literal)
    }

    pub(super) fn trains_all_turns(&self) -> bool {
        self.settings.train_on_turns == TrainOnTurns::All
    }

    /// A row whose targets are what the model writes, where `trained` says so of the message. Padding
    /// is no target, unless it is the id that closes a message.
    pub(super) fn row(&self, written: &ConversationIds, trained: &[bool]) -> RawRow {
        let ids = &written.ids;
        let mut labels = vec![NO_TARGET; ids.len()];
        for (range, _) in written.written.iter().zip(trained).filter(|(_, t)| **t) {
            let mut range = range.clone();
            if matches!(self.tokenizer.generation(), Generation::ChatGlm(_)) {
                // Its code takes all from the first sop on, which is a target itself.
                let sop = self.tokenizer.special().sop;
                let first = ids.iter().position(|&id| id == sop);
                range.start = first.unwrap_or(range.start);
            }
            let end = range.end;
            for index in range {
                labels[index] = self.target(ids[index], index + 1 == end);
            }
        }
        RawRow {
            labels,
            input_ids: ids.iter().copied().map(i64::from).collect(),
            ..RawRow::default()
        }
    }

    fn target(&self, id: u32, closes: bool) -> i64 {
        match id == self.tokenizer.special().pad && !closes {
            true => NO_TARGET,
            false => i64::from(id),
        }
    }

    /// Chunk by chunk: `[gMASK]`, sop, the chunk, and behind the last one what closes a document; the
    /// ids of the chunk and the closing one are targets.
    fn document(&self, text: &str, begins: bool, ends: bool) -> Vec<RawRow> {
        let ids = match (begins, self.literal) {
            // What goes on in the middle of a document has no space put in front.
            (false, LiteralSpecials::AsText) => self
                .tokenizer
                .encode_without_dummy_prefix(text)
                .unwrap_or_else(|_| self.tokenizer.encode(text)),
            _ => self.encode_text(text),
        };
        let Template::PlainText(plain) = &self.settings.template else {
            return Vec::new();
        };
        let special = self.tokenizer.special();
        let size = plain.max_length - 3;
        let chunks = ids.len().div_ceil(size);
        let row = |(index, chunk): (usize, &[u32])| {
            let closing = self.tokenizer.end_of_document();
            let closing = (ends && index + 1 == chunks).then_some(closing);
            let targets = chunk.iter().map(|&id| self.target(id, false));
            let ids = [special.gmask, special.sop].into_iter();
            let ids = ids.chain(chunk.iter().copied()).chain(closing);
            RawRow {
                input_ids: ids.map(i64::from).collect(),
                labels: [NO_TARGET; 2]
                    .into_iter()
                    .chain(targets)
                    .chain(closing.map(i64::from))
                    .collect(),
                ..RawRow::default()
            }
        };
        ids.chunks(size).enumerate().map(row).collect()
    }
}
