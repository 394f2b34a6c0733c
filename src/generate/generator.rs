//! The stages at work: prompts in, one token after another out.

use std::ops::ControlFlow;
use std::time::Duration;

use super::GenerateError;
use super::sampling::{self, Draw};
use crate::adapter::{AdapterError, ParameterSpec, ParameterState, files};
use crate::config::generate::{GenerateOptions, Sampling};
use crate::config::run::{ProductSums, Recompute, STALL_TIMEOUT, TransportKind};
use crate::data::batch::MicroBatch;
use crate::data::rows::PromptRow;
use crate::model::head::LogitsRows;
use crate::model::trainables::Trainables;
use crate::pipeline::base::{Base, Layout};
use crate::pipeline::launch::Engine;
use crate::pipeline::messages::{CachePlan, InferPlan};
use crate::pipeline::partition;
use crate::pipeline::schedule::Schedule;

/// A model at work that continues prompts.
pub struct Generator {
    engine: Engine,
    positions: usize,
}

/// One prompt, and how it is to be continued.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The prompt.
    pub prompt: &'a PromptRow,
    /// Most ids to generate.
    pub max_new_tokens: usize,
    /// The ids that end the answer; they are not handed on.
    pub stop_at: &'a [u32],
    /// How each token is chosen.
    pub sampling: &'a Sampling,
    /// Number of the prompt, which its random numbers belong to.
    pub number: u64,
    /// Ids from here on are never chosen: rows of the head beyond the tokenizer's ids.
    pub usable_ids: usize,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With the id that ends answers.
    Complete,
    /// At `max_new_tokens`, or at the model's longest sequence.
    Length,
    /// Whoever took the tokens wanted no more.
    Stopped,
}

impl Generator {
    /// Starts the stages, with room for prompts of `longest` tokens.
    ///
    /// # Errors
    /// The adapter does not fit the model, or a stage cannot be started.
    pub fn start(
        base: &Base,
        options: &GenerateOptions,
        longest: usize,
    ) -> Result<Self, GenerateError> {
        Self::start_for(base, options, longest, 1)
    }

    /// Starts the stages, with room for `max_tokens` tokens in `max_sequences` sequences at a time.
    ///
    /// # Errors
    /// As [`Generator::start`].
    pub fn start_for(
        base: &Base,
        options: &GenerateOptions,
        max_tokens: usize,
        max_sequences: usize,
    ) -> Result<Self, GenerateError> {
        let tied = base.head_source.tied;
        let section = match &options.adapter {
            Some(folder) => Some(files::section_of(folder)?),
            None => None,
        };
        let trainables = match &section {
            Some(section) => Trainables::new(&base.config, section, tied)?,
            None => Trainables::none(tied),
        };
        let values = match (&section, &options.adapter) {
            (Some(section), Some(folder)) => files::read(folder, section, trainables.specs())?,
            _ => Default::default(),
        };
        let head_cost = partition::head_cost(&base.config, 1.0, Recompute::None, false);
        let stages = base.stages(&options.devices, 1, options.balance.as_deref(), head_cost)?;
        let layout = Layout {
            devices: options.devices.clone(),
            precision: options.precision,
            rotary_table: options.rotary_table,
            product_sums: ProductSums::F32,
            schedule: Schedule::one_forward_one_backward(stages.len(), 1),
            recompute: vec![Recompute::Block; stages.len()],
            stages,
            max_rows: max_tokens,
            max_sequences,
            transport: TransportKind::Auto,
            threads: options.threads,
            stall_timeout: Duration::from_secs(STALL_TIMEOUT),
        };
        let initial = move |spec: &ParameterSpec| match values.get(&spec.name) {
            Some(whole) => Ok(ParameterState::fresh(spec.cut(whole))),
            None => Err(AdapterError::MissingTensor {
                file: "adapter".into(),
                name: spec.name.clone(),
                found: values.keys().cloned().collect::<Vec<_>>().join(", "),
            }),
        };
        Ok(Generator {
            engine: base.start(&layout, trainables, Box::new(initial))?,
            positions: base.config.max_sequence_length,
        })
    }

    /// Sum of the losses of all targets of a micro-batch.
    ///
    /// # Errors
    /// A stage failed.
    pub fn loss(&mut self, batch: MicroBatch) -> Result<f32, GenerateError> {
        Ok(self.engine.evaluate(batch)?)
    }

    /// Continues a prompt token by token. `emit` gets each new id and the logits `[V]` it was chosen
    /// from, and says whether to go on.
    ///
    /// # Errors
    /// A stage failed, or logits that are not finite.
    pub fn generate(
        &mut self,
        request: &Request<'_>,
        emit: &mut dyn FnMut(u32, &[f32]) -> ControlFlow<()>,
    ) -> Result<End, GenerateError> {
        let mut batch = MicroBatch::from_prompts([request.prompt]);
        let mut seen = request.prompt.input_ids.clone();
        let mut filled = 0;
        // No answer has more tokens than the model has positions.
        let room = batch.tokens() + request.max_new_tokens.min(self.positions);
        for token in 0..request.max_new_tokens {
            let next = batch.tokens();
            let logits = self.engine.infer(InferPlan {
                batch: batch.clone(),
                rows: LogitsRows::Last,
                cache: Some(CachePlan {
                    renew: (filled == 0).then_some(room),
                    starts: vec![0],
                    filled: vec![filled],
                }),
            })?;
            filled += next;
            let draw = Draw {
                prompt: request.number,
                token: token as u32,
            };
            let usable = &logits[..request.usable_ids.min(logits.len())];
            let id = sampling::choose(usable, &seen, request.sampling, draw);
            let id = id.map_err(|problem| GenerateError::Sample {
                token: token + 1,
                problem,
            })?;
            if request.stop_at.contains(&id) {
                return Ok(End::Complete);
            }
            if emit(id, &logits).is_break() {
                return Ok(End::Stopped);
            }
            seen.push(id);
            batch = batch.continued(&[id]);
            let last = batch.position.iter().chain(&batch.block_position).max();
            if last.is_some_and(|&position| position as usize >= self.positions) {
                break;
            }
        }
        Ok(End::Length)
    }

    /// Continues a prompt with the likeliest token, `max_new_tokens` times or until `stop_at` (which
    /// is not handed on) or the model's longest sequence. `emit` gets each token and the logits `[V]`
    /// it was chosen from; of equal logits the lower id wins.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn greedy(
        &mut self,
        prompt: &PromptRow,
        max_new_tokens: usize,
        stop_at: &[u32],
        emit: &mut dyn FnMut(u32, &[f32]),
    ) -> Result<(), GenerateError> {
        let request = Request {
            prompt,
            max_new_tokens,
            stop_at,
            sampling: &Sampling::greedy(),
            number: 0,
            usable_ids: usize::MAX,
        };
        self.generate(&request, &mut |id, logits| {
            emit(id, logits);
            ControlFlow::Continue(())
        })?;
        Ok(())
    }
}
