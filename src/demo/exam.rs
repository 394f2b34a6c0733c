//! Asking a model from disk, and judging its answers.

use std::path::Path;

use serde::Serialize;

use super::corpus::{self, Identity, Question, Who};
use super::{DemoError, DemoOptions, rows};
use crate::config::generate::GenerateOptions;
use crate::config::run::{Device, Precision, Quantization, RotaryPrecision};
use crate::data::rows::PromptRow;
use crate::data::tokenizer::{ConfigIds, TokenizerFiles};
use crate::generate::Generator;
use crate::pipeline::base::Base;

/// Longer than every answer of the corpus.
const MAX_NEW_TOKENS: usize = 64;

/// What the models are asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Questions {
    /// About the speaker; the answers are the base's.
    pub identity: Vec<Question>,
    /// About anything else.
    pub plain: Vec<Question>,
}

impl Questions {
    /// All that the corpus has, personas apart.
    pub fn new() -> Self {
        Questions {
            identity: corpus::identity(Who::Old),
            plain: corpus::plain(),
        }
    }
}

impl Default for Questions {
    fn default() -> Self {
        Questions::new()
    }
}

/// A model's answers, in the order of [`Questions`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Answers {
    /// To the questions about the speaker.
    pub identity: Vec<String>,
    /// To the others.
    pub plain: Vec<String>,
}

/// What a model's answers are worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Questions about the speaker that were asked.
    pub identity_asked: usize,
    /// Answers that give the right name, and nothing of the other identity.
    pub identity_right: usize,
    /// Other questions that were asked.
    pub plain_asked: usize,
    /// Answers that are right to the letter.
    pub plain_right: usize,
    /// Share of the other answers that must be right, in per cent.
    pub plain_needed: usize,
}

impl Verdict {
    /// Judges the answers of the base, which must be the old identity and know at least 95 % of its
    /// pairs.
    pub fn of_base(questions: &Questions, answers: &Answers) -> Self {
        Verdict::new(questions, answers, Who::Old, 95)
    }

    /// Judges the answers of a tuned model, which must be the new identity and still know at least
    /// 90 % of the pairs.
    pub fn of_tuned(questions: &Questions, answers: &Answers) -> Self {
        Verdict::new(questions, answers, Who::New, 90)
    }

    fn new(questions: &Questions, answers: &Answers, who: Who, plain_needed: usize) -> Self {
        let identity = answers.identity.iter();
        let plain = questions.plain.iter().zip(&answers.plain);
        Verdict {
            identity_asked: questions.identity.len(),
            identity_right: identity.filter(|answer| speaks_as(who, answer)).count(),
            plain_asked: questions.plain.len(),
            plain_right: plain.filter(|(q, answer)| q.answer == **answer).count(),
            plain_needed,
        }
    }

    /// Whether the model learned what it should, and kept what it knew.
    pub fn passed(&self) -> bool {
        self.identity_right == self.identity_asked
            && self.plain_right * 100 >= self.plain_asked * self.plain_needed
    }
}

/// Whether an answer gives the name of `who`, in either language, and nothing of the other.
pub fn speaks_as(who: Who, answer: &str) -> bool {
    let other = match who {
        Who::Old => Who::New,
        Who::New => Who::Old,
    };
    let own_name = Identity::of(who)
        .iter()
        .any(|own| answer.contains(own.name));
    let foreign = Identity::of(other)
        .iter()
        .any(|other| answer.contains(other.name) || answer.contains(other.studio));
    own_name && !foreign
}

/// Opens a model folder with its tokenizer, and an adapter over it, and asks every question.
///
/// # Errors
/// A folder cannot be read, or a stage failed.
pub fn ask(
    model: &Path,
    adapter: Option<&Path>,
    devices: &[Device],
    questions: &Questions,
    options: &DemoOptions,
) -> Result<Answers, DemoError> {
    let base = Base::open(model, Quantization::None)?;
    let config = &base.config;
    let ids = ConfigIds::from(config);
    let (tokenizer, _) = TokenizerFiles::read(model)?.build(&ids, Some(config.vocab_size))?;
    let prompt = |question: &Question| {
        PromptRow::new(&rows::prompt(&tokenizer, question), config).map_err(|problem| {
            DemoError::Question {
                question: question.question.clone(),
                problem,
            }
        })
    };
    let prompts = |questions: &[Question]| -> Result<Vec<PromptRow>, DemoError> {
        questions.iter().map(prompt).collect()
    };
    let (identity, plain) = (prompts(&questions.identity)?, prompts(&questions.plain)?);
    let longest = identity.iter().chain(&plain).map(|row| row.input_ids.len());
    let settings = GenerateOptions {
        adapter: adapter.map(Path::to_owned),
        precision: Precision::F32,
        rotary_table: RotaryPrecision::F32,
        threads: options.threads,
        ..GenerateOptions::new(model.to_owned(), devices.to_vec())
    };
    let mut generator = Generator::start(&base, &settings, longest.max().unwrap_or(1))?;
    let mut answer = |row: &PromptRow| -> Result<String, DemoError> {
        let mut ids = Vec::new();
        let stop_at = &config.eos_token_ids;
        generator.greedy(row, MAX_NEW_TOKENS, stop_at, &mut |id, _| ids.push(id))?;
        Ok(tokenizer.decode(&ids)?)
    };
    Ok(Answers {
        identity: identity.iter().map(&mut answer).collect::<Result<_, _>>()?,
        plain: plain.iter().map(&mut answer).collect::<Result<_, _>>()?,
    })
}
