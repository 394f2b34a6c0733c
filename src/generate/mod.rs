//! `mp-train generate`: prompts continued with a key/value cache over one or more stages, ids or text
//! in and out.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::generate::{GenerateOptions, Prompt};
use crate::data::rows::{PromptRow, RawRow};
use crate::data::tokenizer::{EraWarning, TokenizerError};
use crate::pipeline::base::Base;

pub mod answer_text;
mod error;
mod generator;
pub mod question;
pub mod sampling;
pub mod template_file;
pub mod wording;

use answer_text::AnswerText;
pub use error::{GenerateError, TemplateError};
pub use generator::{End, Generator, Request};
use question::{Question, QuestionProblem, RowError};
use template_file::Asking;
use wording::{Misfit, Worded, Wording};

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every prompt is answered.
    Finished,
    /// A signal came first.
    Interrupted,
}

/// A row of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// Token ids.
    Ids(Prompt),
    /// A question in text.
    Text {
        /// Its line, from 1.
        line: usize,
        /// The question.
        question: Question,
    },
}

/// What the model says to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The generated ids, without the one that ends the answer.
    pub new_tokens: Vec<u32>,
    /// Their text, where the row was text.
    pub text: Option<String>,
}

/// Worth a line to the user; nothing failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// Of the tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] EraWarning),
    /// A flag contradicts the training.
    #[error(
        "training used the template {saved} (its template.toml), but --template {asked} is used \
         now: leave the flag out to ask as in training"
    )]
    OtherTemplate {
        /// The training's.
        saved: &'static str,
        /// The user's.
        asked: &'static str,
    },
    /// Rows that the template has no place for.
    #[error(
        "{rows} of the rows (the first on line {line}) {} in the model's template, {template}; they \
         are asked in their own form, which the model was not trained on",
        match .misfit {
            Misfit::Instruction => "are instructions, which have no place",
            Misfit::History => "have earlier turns, which have no place",
        }
    )]
    RowForm {
        /// What has no place.
        misfit: Misfit,
        /// How many rows have it.
        rows: usize,
        /// The first of them.
        line: usize,
        /// The template.
        template: &'static str,
    },
}

/// A row, ready for the model.
struct Ready {
    prompt: PromptRow,
    /// Of text: how many of the last ids the answer goes on with.
    continued: Option<usize>,
}

/// Answers every row in order and hands each answer, with the row's index, to `emit`. What else the
/// user should know goes to `notify`.
///
/// # Errors
/// Model, adapter, settings or rows that the user can mend; a stage that failed.
pub fn run(
    options: &GenerateOptions,
    inputs: &[Input],
    emit: &mut dyn FnMut(usize, &Answer),
    notify: &mut dyn FnMut(Notice),
    stop: &AtomicBool,
) -> Result<Outcome, GenerateError> {
    options.sampling.check()?;
    let base = Base::open(&options.model, options.quantization)?;
    let wording = wording(options, &base, inputs, notify)?;
    let ready = prepare(&base, wording.as_ref(), inputs, notify)?;
    let Some(longest) = ready.iter().map(|row| row.prompt.input_ids.len()).max() else {
        return Ok(Outcome::Finished);
    };
    let mut generator = Generator::start(&base, options, longest)?;
    for (index, row) in ready.iter().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return Ok(Outcome::Interrupted);
        }
        let of_text = row.continued.and(wording.as_ref());
        let stop_at = match (of_text, options.stops(&base.config)) {
            (Some(words), stops @ [_, ..]) => words.stops(stops),
            (_, stops) => stops.to_vec(),
        };
        let request = Request {
            prompt: &row.prompt,
            max_new_tokens: options.max_new_tokens,
            stop_at: &stop_at,
            sampling: &options.sampling,
            number: index as u64,
            usable_ids: of_text.map_or(usize::MAX, |words| words.tokenizer().size() as usize),
        };
        let mut new_tokens = Vec::new();
        let end = generator.generate(&request, &mut |id, _| {
            new_tokens.push(id);
            match stop.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if end == End::Stopped {
            return Ok(Outcome::Interrupted);
        }
        let text = match (of_text, row.continued) {
            (Some(words), Some(continued)) => {
                let ids = &row.prompt.input_ids;
                let mut answer = AnswerText::new(words.tokenizer(), &ids[ids.len() - continued..])?;
                for &id in &new_tokens {
                    answer.push(id)?;
                }
                Some(answer.text().to_owned())
            }
            _ => None,
        };
        emit(index, &Answer { new_tokens, text });
    }
    Ok(Outcome::Finished)
}

/// Tokenizer and template, if there is text to be asked.
fn wording(
    options: &GenerateOptions,
    base: &Base,
    inputs: &[Input],
    notify: &mut dyn FnMut(Notice),
) -> Result<Option<Wording>, GenerateError> {
    let first_text = inputs.iter().find_map(|input| match input {
        Input::Text { line, .. } => Some(*line),
        Input::Ids(_) => None,
    });
    let Some(line) = first_text else {
        return Ok(None);
    };
    let (asking, notice) = Asking::of(options)?;
    notice.into_iter().for_each(&mut *notify);
    match Wording::open(&options.model, &base.config, asking) {
        Ok((wording, warnings)) => {
            warnings.into_iter().map(Notice::from).for_each(notify);
            Ok(Some(wording))
        }
        Err(TokenizerError::NoFile { folder }) => Err(GenerateError::Row(RowError {
            line,
            problem: QuestionProblem::NoTokenizer {
                folder: folder.display().to_string(),
            },
        })),
        Err(error) => Err(error.into()),
    }
}

/// Checks all rows before the stages start.
fn prepare(
    base: &Base,
    wording: Option<&Wording>,
    inputs: &[Input],
    notify: &mut dyn FnMut(Notice),
) -> Result<Vec<Ready>, GenerateError> {
    let mut misfits: Vec<(Misfit, usize, usize)> = Vec::new();
    let mut ready = Vec::with_capacity(inputs.len());
    for input in inputs {
        let (line, raw, continued) = match (input, wording) {
            (Input::Text { line, question }, Some(wording)) => {
                if let Some(misfit) = wording.misfit(question) {
                    match misfits.iter_mut().find(|(known, ..)| *known == misfit) {
                        Some((_, rows, _)) => *rows += 1,
                        None => misfits.push((misfit, 1, *line)),
                    }
                }
                let Worded {
                    input_ids,
                    continued,
                } = wording.words(question)?;
                (*line, raw_row(&input_ids), Some(continued))
            }
            (Input::Ids(prompt), _) => (prompt.line, raw_prompt(prompt), None),
            // There is a wording if there is any text.
            (Input::Text { .. }, None) => continue,
        };
        let prompt = PromptRow::new(&raw, &base.config);
        ready.push(Ready {
            prompt: prompt.map_err(|problem| GenerateError::Prompt { line, problem })?,
            continued,
        });
    }
    let template = wording.map_or("", Wording::template);
    for (misfit, rows, line) in misfits {
        notify(Notice::RowForm {
            misfit,
            rows,
            line,
            template,
        });
    }
    Ok(ready)
}

fn raw_prompt(prompt: &Prompt) -> RawRow {
    RawRow {
        context_length: prompt.context_length,
        position_ids: prompt.position_ids.clone(),
        ..raw_row(&prompt.input_ids)
    }
}

/// A row of ids, its context and positions by the model's rule.
pub fn raw_row(input_ids: &[u32]) -> RawRow {
    RawRow {
        input_ids: input_ids.iter().map(|&id| i64::from(id)).collect(),
        ..RawRow::default()
    }
}
