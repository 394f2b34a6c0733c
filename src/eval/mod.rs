//! `mp-train eval`: loss and perplexity of a data set, and what generated answers are worth, as THUDM's
//! ptuning/main.py measures it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::Serialize;

use crate::config::generate::GenerateOptions;
use crate::config::run::TransportKind;
use crate::data::DataError;
use crate::data::batch::MicroBatch;
use crate::data::rows::Rows;
use crate::data::template::{Template, TemplateSettings};
use crate::data::text_rows::BadRows;
use crate::data::tokenizer::GlmTokenizer;
use crate::data::training_data::{DataSettings, TrainingData, open_training_data};
use crate::generate::template_file::Asking;
use crate::generate::{End, Generator, Request};
use crate::pipeline::base::{Base, check_devices};
use crate::pipeline::prepare::open_tokenizer;
use crate::report::{EvaluatingReport, Event};

mod asked;
pub mod bleu;
mod error;
pub mod rouge;
pub mod scores;
pub mod words;

pub use asked::Asked;
pub use error::EvalError;
use scores::{Mean, Scores, stripped};

/// Most tokens of question and answer together when nothing is said, as in THUDM's evaluation.
pub const MAX_LENGTH: usize = 512;
/// Tokens and rows that go through the stages at once while the loss is measured: enough to keep them
/// busy, and less than training takes.
const LOSS_TOKENS: usize = 1024;
const LOSS_ROWS: usize = 16;

/// What is evaluated, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalOptions {
    /// Model, adapter, devices and sampling; its `max_new_tokens` is not looked at.
    pub model: GenerateOptions,
    /// Most ids of an answer; without it question and answer have [`MAX_LENGTH`] together.
    pub max_new_tokens: Option<usize>,
    /// Files, folders and patterns of rows, in any form that can be trained on.
    pub data: Vec<PathBuf>,
    /// What differs from the template of the training.
    pub columns: Columns,
    /// What happens to rows that cannot be used.
    pub bad_rows: BadRows,
    /// Only so many rows, from the first on.
    pub max_rows: Option<usize>,
    /// Whether no answers are generated.
    pub loss_only: bool,
}

/// Names of columns and lengths, where they are not those of the template.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Question, instruction, text or list of messages.
    pub prompt: Option<String>,
    /// Alpaca's input.
    pub input: Option<String>,
    /// Answer.
    pub response: Option<String>,
    /// Earlier turns.
    pub history: Option<String>,
    /// Most tokens of a question.
    pub max_source_length: Option<usize>,
    /// Most tokens of an answer.
    pub max_target_length: Option<usize>,
}

impl Columns {
    fn put_into(&self, settings: &mut TemplateSettings) {
        let put = |name: &mut String, given: &Option<String>| {
            if let Some(given) = given {
                name.clone_from(given);
            }
        };
        match &mut settings.template {
            Template::Alpaca(alpaca) => {
                put(&mut alpaca.instruction, &self.prompt);
                put(&mut alpaca.input, &self.input);
                put(&mut alpaca.output, &self.response);
            }
            Template::PromptResponse(pair) => {
                put(&mut pair.prompt, &self.prompt);
                put(&mut pair.response, &self.response);
                put(&mut pair.history, &self.history);
            }
            Template::Messages(messages) => put(&mut messages.messages, &self.prompt),
            Template::ShareGpt(share_gpt) => put(&mut share_gpt.conversations, &self.prompt),
            Template::PlainText(plain) => {
                if let Some(column) = &self.prompt {
                    plain.columns = vec![column.clone()];
                }
            }
        }
        settings.max_source_length = self.max_source_length.unwrap_or(settings.max_source_length);
        settings.max_target_length = self.max_target_length.unwrap_or(settings.max_target_length);
    }
}

/// How an evaluation ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Everything is measured.
    Finished(Evaluation),
    /// A signal came first.
    Interrupted,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Rows.
    pub rows: usize,
    /// Their targets.
    pub target_tokens: usize,
    /// Mean loss over all targets, in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// The answers, if any were generated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub answers: Option<AnswersReport>,
}

/// What the answers are worth together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct AnswersReport {
    /// Means over all rows, empty answers included.
    #[serde(flatten)]
    pub mean: Scores,
    /// Answers without text, which are worth 0.
    pub empty_predictions: usize,
    /// Labels without text, which no answer can meet.
    pub empty_labels: usize,
    /// Answers that were cut off at their longest.
    pub cut_off: usize,
}

/// An answer, beside what was expected.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// What was asked, special tokens left out.
    pub prompt: String,
    /// What was expected, cut as in training.
    pub label: String,
    /// The answer.
    pub prediction: String,
    /// What it is worth.
    #[serde(flatten)]
    pub scores: Scores,
}

/// Measures the loss of all rows, then answers them one by one and hands each answer to `emit`. What
/// the user should know goes to `reporter`.
///
/// # Errors
/// Model, adapter, settings or rows that the user can mend; a stage that failed.
pub fn run(
    options: &EvalOptions,
    reporter: &mut dyn FnMut(Event),
    emit: &mut dyn FnMut(&Prediction),
    stop: &AtomicBool,
) -> Result<Outcome, EvalError> {
    let model = &options.model;
    model
        .sampling
        .check()
        .map_err(crate::generate::GenerateError::from)?;
    check_devices(&model.devices, model.precision, TransportKind::Auto)?;
    let base = Base::open(&model.model, model.quantization)?;
    let mut warnings: Vec<String> = base.head_source.warning.iter().cloned().collect();
    let tokenizer = open_tokenizer(&model.model, &base.config, &mut warnings)?;
    let (Asking { mut settings, .. }, notice) = Asking::of(model)?;
    options.columns.put_into(&mut settings);
    let plain_text = settings.template.plain_text().is_some();
    warnings.extend(notice.iter().map(ToString::to_string));
    let data = match open(options, settings, tokenizer.as_ref(), &base, stop) {
        Err(DataError::Interrupted) => return Ok(Outcome::Interrupted),
        data => data?,
    };
    warnings.extend(data.notices());
    warnings
        .into_iter()
        .map(Event::Warning)
        .for_each(&mut *reporter);
    let scorer = match (options.loss_only, tokenizer) {
        (true, _) => None,
        (false, _) if plain_text && !data.holds_token_ids => return Err(EvalError::NothingAsked),
        (false, Some(tokenizer)) => Some(tokenizer),
        (false, None) => {
            let folder = model.model.clone();
            return Err(EvalError::NoTokenizer { folder });
        }
    };
    let rows = match options.max_rows {
        Some(most) if most < data.train.len() => data.train.split_off((0..most).collect()).1,
        _ => data.train,
    };
    let longest = rows.lengths().max().unwrap_or(0);
    let (max_tokens, max_rows) = (longest.max(LOSS_TOKENS), LOSS_ROWS.min(rows.len()));
    let generator = Generator::start_for(&base, model, max_tokens, max_rows);
    let mut run = Run {
        options,
        base: &base,
        rows: &rows,
        generator: generator?,
        reporter,
        stop,
    };
    let Some(loss) = run.loss(max_tokens, max_rows)? else {
        return Ok(Outcome::Interrupted);
    };
    let answers = match scorer {
        None => None,
        Some(tokenizer) => match run.answers(&tokenizer, emit)? {
            None => return Ok(Outcome::Interrupted),
            answers => answers,
        },
    };
    Ok(Outcome::Finished(Evaluation {
        rows: rows.len(),
        target_tokens: rows.targets(),
        loss,
        perplexity: loss.exp(),
        answers,
    }))
}

/// The rows, as training would see them.
fn open(
    options: &EvalOptions,
    template: TemplateSettings,
    tokenizer: Option<&GlmTokenizer>,
    base: &Base,
    stop: &AtomicBool,
) -> Result<TrainingData, DataError> {
    let settings = DataSettings {
        train: options.data.clone(),
        validation: Vec::new(),
        validation_split: 0.0,
        seed: 0,
        template,
        bad_rows: options.bad_rows,
        cache_dir: None,
        cache_token_ids: false,
        threads: options.model.threads,
    };
    let mut ask = |_| match stop.load(Ordering::Relaxed) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    open_training_data(&settings, tokenizer, &base.config, &mut ask)
}

/// Rows on their way through the stages.
struct Run<'a> {
    options: &'a EvalOptions,
    base: &'a Base,
    rows: &'a Rows,
    generator: Generator,
    reporter: &'a mut dyn FnMut(Event),
    stop: &'a AtomicBool,
}

impl Run<'_> {
    /// Mean loss over all targets; `None` when a signal came.
    fn loss(&mut self, max_tokens: usize, max_rows: usize) -> Result<Option<f64>, EvalError> {
        let began = Instant::now();
        let (mut sum, mut done) = (0.0, 0);
        for batch in MicroBatch::packed(self.rows, max_tokens, max_rows) {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let first = done + 1;
            done += batch.sequences.len();
            let loss = self.generator.loss(batch)?;
            if !loss.is_finite() {
                let last = done;
                return Err(EvalError::NotFinite { first, last, loss });
            }
            sum += f64::from(loss);
            self.tell("loss", done, began);
        }
        Ok(Some(sum / self.rows.targets() as f64))
    }

    /// Answers to all rows and what they are worth; `None` when a signal came.
    fn answers(
        &mut self,
        tokenizer: &GlmTokenizer,
        emit: &mut dyn FnMut(&Prediction),
    ) -> Result<Option<AnswersReport>, EvalError> {
        let began = Instant::now();
        let mut mean = Mean::default();
        let (mut empty_predictions, mut empty_labels, mut cut_off) = (0, 0, 0);
        for index in 0..self.rows.len() {
            let Some(row) = self.rows.get(index) else {
                break;
            };
            let asked = Asked::of(&row, &self.base.config);
            let mut ids = Vec::new();
            match self.answer(index, &asked, tokenizer, &mut ids)? {
                End::Stopped => return Ok(None),
                End::Length => cut_off += 1,
                End::Complete => {}
            }
            let text = |ids: &[u32]| {
                let text = tokenizer.decode_as_reference(ids);
                let text = text.map(|text| stripped(&text).to_owned());
                text.map_err(|source| EvalError::Text {
                    row: index + 1,
                    source,
                })
            };
            let (label, prediction) = (text(&asked.label)?, text(&ids)?);
            empty_predictions += usize::from(prediction.is_empty());
            empty_labels += usize::from(label.is_empty());
            let scores = Scores::of(&prediction, &label);
            mean.add(scores);
            emit(&Prediction {
                prompt: text(&asked.prompt.input_ids)?,
                label,
                prediction,
                scores,
            });
            self.tell("answers", index + 1, began);
        }
        Ok(Some(AnswersReport {
            mean: mean.get(),
            empty_predictions,
            empty_labels,
            cut_off,
        }))
    }

    /// Answers a row into `ids`.
    fn answer(
        &mut self,
        index: usize,
        asked: &Asked,
        tokenizer: &GlmTokenizer,
        ids: &mut Vec<u32>,
    ) -> Result<End, EvalError> {
        let rest = MAX_LENGTH.saturating_sub(asked.prompt.input_ids.len());
        let request = Request {
            prompt: &asked.prompt,
            max_new_tokens: self.options.max_new_tokens.unwrap_or(rest.max(1)),
            stop_at: self.options.model.stops(&self.base.config),
            sampling: &self.options.model.sampling,
            number: index as u64,
            usable_ids: tokenizer.size() as usize,
        };
        let stop = self.stop;
        let mut take = |id, _: &[f32]| {
            ids.push(id);
            match stop.load(Ordering::Relaxed) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        // Before the first token too: it is the slowest.
        match stop.load(Ordering::Relaxed) {
            true => Ok(End::Stopped),
            false => Ok(self.generator.generate(&request, &mut take)?),
        }
    }

    fn tell(&mut self, what: &'static str, rows: usize, began: Instant) {
        (self.reporter)(Event::Evaluating(EvaluatingReport {
            what,
            rows: rows as u64,
            total_rows: self.rows.len() as u64,
            seconds: began.elapsed().as_secs_f64(),
        }));
    }
}
