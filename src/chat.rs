//! `mp-train chat`: questions and answers, each after all that was said before.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::config::generate::GenerateOptions;
use crate::data::rows::PromptRow;
use crate::data::template::Turn;
use crate::data::tokenizer::TokenizerError;
use crate::generate::answer_text::AnswerText;
use crate::generate::question::Question;
use crate::generate::template_file::Asking;
use crate::generate::wording::{Worded, Wording};
use crate::generate::{End, GenerateError, Generator, Notice, Request, raw_row};
use crate::pipeline::base::Base;

/// Longest answer when nothing is said, in ids; half the model's longest sequence if that is less.
pub const MAX_NEW_TOKENS: usize = 512;

/// A conversation with a model.
pub struct Chat {
    base: Base,
    generator: Generator,
    wording: Wording,
    options: GenerateOptions,
    prompt_limit: usize,
    history: Vec<Turn>,
    asked: u64,
}

/// What became of a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The answer.
    pub text: String,
    /// How it ended.
    pub end: End,
    /// The oldest turns, so many of them, had no place any more and are forgotten.
    pub forgotten: usize,
}

impl Chat {
    /// Opens model, tokenizer and adapter, and starts the stages with room for the longest question.
    /// `max_new_tokens` of the options is not looked at: without one given here it is
    /// [`MAX_NEW_TOKENS`].
    ///
    /// # Errors
    /// Model, tokenizer, adapter or settings that the user can mend; a stage that failed.
    pub fn open(
        options: &GenerateOptions,
        max_new_tokens: Option<usize>,
        notify: &mut dyn FnMut(Notice),
    ) -> Result<Self, GenerateError> {
        options.sampling.check()?;
        let base = Base::open(&options.model, options.quantization)?;
        let (asking, notice) = Asking::of(options)?;
        notice.into_iter().for_each(&mut *notify);
        let (wording, warnings) = Wording::open(&options.model, &base.config, asking)?;
        warnings.into_iter().map(Notice::from).for_each(notify);
        let max_sequence_length = base.config.max_sequence_length;
        let new_tokens = max_new_tokens.unwrap_or(MAX_NEW_TOKENS.min(max_sequence_length / 2));
        let prompt_limit = max_sequence_length.saturating_sub(new_tokens);
        if prompt_limit == 0 {
            return Err(GenerateError::NoRoom {
                new_tokens,
                max_sequence_length,
            });
        }
        Ok(Chat {
            generator: Generator::start(&base, options, prompt_limit)?,
            base,
            wording,
            options: GenerateOptions {
                max_new_tokens: new_tokens,
                ..options.clone()
            },
            prompt_limit,
            history: Vec::new(),
            asked: 0,
        })
    }

    /// Asks a question after all turns so far and hands the answer to `show`, piece by piece. `stop`
    /// ends it early; what was said until then is remembered.
    ///
    /// # Errors
    /// A question that is empty or too long, which leaves the conversation as it was; a stage that
    /// failed.
    pub fn ask(
        &mut self,
        query: &str,
        show: &mut dyn FnMut(&str),
        stop: &AtomicBool,
    ) -> Result<Reply, GenerateError> {
        if query.is_empty() {
            return Err(GenerateError::EmptyQuestion);
        }
        let (
            Worded {
                input_ids,
                continued,
            },
            forgotten,
        ) = self.fitting_prompt(query)?;
        let prompt = PromptRow::new(&raw_row(&input_ids), &self.base.config);
        let prompt = prompt.map_err(|problem| GenerateError::Prompt { line: 1, problem })?;
        let tokenizer = self.wording.tokenizer();
        let stop_at = match self.options.stops(&self.base.config) {
            [] => Vec::new(),
            stops => self.wording.stops(stops),
        };
        let request = Request {
            prompt: &prompt,
            max_new_tokens: self.options.max_new_tokens,
            stop_at: &stop_at,
            sampling: &self.options.sampling,
            number: self.asked,
            usable_ids: tokenizer.size() as usize,
        };
        self.asked += 1;
        let mut answer = AnswerText::new(tokenizer, &input_ids[input_ids.len() - continued..])?;
        let mut undecodable: Option<TokenizerError> = None;
        let end = self.generator.generate(&request, &mut |id, _| {
            match answer.push(id) {
                Ok("") => {}
                Ok(text) => show(text),
                Err(error) => undecodable = Some(error),
            }
            match undecodable.is_some() || stop.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        if let Some(error) = undecodable {
            return Err(error.into());
        }
        let rest = answer.finish();
        if !rest.is_empty() {
            show(rest);
        }
        let text = answer.text().to_owned();
        let said_nothing = end == End::Stopped && text.is_empty();
        if self.wording.has_history() && !said_nothing {
            self.history.drain(..forgotten);
            self.history.push(Turn {
                query: query.to_owned(),
                answer: text.clone(),
            });
        }
        Ok(Reply {
            text,
            end,
            forgotten,
        })
    }

    /// The ids of a question after as many of the latest turns as there is room for, and how many of
    /// the oldest there is none for.
    fn fitting_prompt(&self, query: &str) -> Result<(Worded, usize), GenerateError> {
        let mut forgotten = 0;
        loop {
            let worded = self.wording.words(&Question::Text {
                query: query.to_owned(),
                history: self.history[forgotten..].to_vec(),
            })?;
            let tokens = worded.input_ids.len();
            if tokens <= self.prompt_limit {
                return Ok((worded, forgotten));
            }
            if forgotten == self.history.len() {
                return Err(GenerateError::TooLong {
                    tokens,
                    limit: self.prompt_limit,
                    new_tokens: self.options.max_new_tokens,
                    max_sequence_length: self.base.config.max_sequence_length,
                });
            }
            forgotten += 1;
        }
    }

    /// Forgets all turns.
    pub fn clear(&mut self) {
        self.history.clear();
    }

    /// The turns that the next question will follow.
    pub fn history(&self) -> &[Turn] {
        &self.history
    }

    /// Whether a question is asked after earlier turns; a model that was trained on single ones sees
    /// each alone.
    pub fn has_history(&self) -> bool {
        self.wording.has_history()
    }

    /// The name of the template that questions are put into.
    pub fn template(&self) -> &'static str {
        self.wording.template()
    }
}
