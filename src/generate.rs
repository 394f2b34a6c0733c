//! `mp-train generate`: greedy answers with a key/value cache, over one or more stages.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::adapter::{AdapterError, ParameterSpec, ParameterState, files};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::adapter_files::LoraFiles;
use crate::checkpoint::prefix_files::PrefixFiles;
use crate::config::generate::{GenerateOptions, Prompt};
use crate::config::run::{AdapterSection, LoraSection, PrefixSection, Recompute, ScheduleKind};
use crate::data::RowProblem;
use crate::data::batch::MicroBatch;
use crate::data::rows::{PromptRow, RawRow};
use crate::model::ModelError;
use crate::model::head::LogitsRows;
use crate::model::trainables::Trainables;
use crate::pipeline::base::{Base, Layout, StartError};
use crate::pipeline::failure::Failure;
use crate::pipeline::launch::Engine;
use crate::pipeline::partition;
use crate::pipeline::plan::{CachePlan, InferPlan};
use crate::pipeline::schedule::Schedule;
use crate::report::FailureClass;

/// How a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every prompt is answered.
    Finished,
    /// A signal came first.
    Interrupted,
}

/// Why nothing more could be generated.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Opening the model or starting the stages.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The adapter.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The adapter's files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A prompt.
    #[error("line {line} of the prompts: {problem}")]
    Prompt {
        /// Its line, from 1.
        line: usize,
        /// What is wrong with it.
        problem: RowProblem,
    },
    /// A stage.
    #[error(transparent)]
    Failure(#[from] Failure),
}

impl GenerateError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            GenerateError::Start(error) => error.is_machine(),
            GenerateError::Failure(failure) => failure.is_machine(),
            GenerateError::Adapter(error) => error.is_machine(),
            GenerateError::Checkpoint(error) => error.is_machine(),
            GenerateError::Model(error) => error.is_machine(),
            GenerateError::Prompt { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}

/// Answers every prompt in order and hands each answer to `emit`.
///
/// # Errors
/// Model, adapter or prompts that the user can mend; a stage that failed.
pub fn run(
    options: &GenerateOptions,
    prompts: &[Prompt],
    emit: &mut dyn FnMut(&Prompt, &[u32]),
    stop: &AtomicBool,
) -> Result<Outcome, GenerateError> {
    let base = Base::open(&options.model)?;
    let rows = prompts
        .iter()
        .map(|prompt| prompt_row(prompt, &base))
        .collect::<Result<Vec<_>, _>>()?;
    let longest = rows.iter().map(|row| row.input_ids.len()).max();
    let Some(longest) = longest else {
        return Ok(Outcome::Finished);
    };
    let mut generator = Generator::start(&base, options, longest)?;
    let stop_at = options.stop_at_eop.then_some(base.config.eos_token_id);
    for (prompt, row) in prompts.iter().zip(&rows) {
        if stop.load(Ordering::Relaxed) {
            return Ok(Outcome::Interrupted);
        }
        let mut answer = Vec::new();
        generator.greedy(row, options.max_new_tokens, stop_at, &mut |id, _| {
            answer.push(id)
        })?;
        emit(prompt, &answer);
    }
    Ok(Outcome::Finished)
}

fn prompt_row(prompt: &Prompt, base: &Base) -> Result<PromptRow, GenerateError> {
    let row = RawRow {
        input_ids: prompt.input_ids.iter().map(|&id| i64::from(id)).collect(),
        labels: Vec::new(),
        context_length: prompt.context_length,
        position_ids: prompt.position_ids.clone(),
    };
    PromptRow::new(&row, &base.config).map_err(|problem| GenerateError::Prompt {
        line: prompt.line,
        problem,
    })
}

/// A model at work that continues prompts.
pub struct Generator {
    engine: Engine,
    positions: usize,
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
        let tied = base.head_source.tied;
        let section = match &options.adapter {
            Some(folder) => Some(adapter_section(folder)?),
            None => None,
        };
        let trainables = match &section {
            Some(section) => Trainables::new(&base.config, section, tied)?,
            None => Trainables::none(tied),
        };
        let values = match (&section, &options.adapter) {
            (Some(AdapterSection::Lora(lora)), Some(folder)) => {
                files::read_lora(folder, lora, trainables.specs())?
            }
            (Some(AdapterSection::Prefix(prefix)), Some(folder)) => {
                files::read_prefix(folder, prefix, trainables.specs())?
            }
            _ => Default::default(),
        };
        let head_cost = partition::head_cost(&base.config, 1.0, Recompute::None, false);
        let stages = base.stages(&options.devices, options.balance.as_deref(), head_cost)?;
        let layout = Layout {
            devices: options.devices.clone(),
            precision: options.precision,
            schedule: Schedule::build(ScheduleKind::OneForwardOneBackward, stages.len(), 1),
            recompute: vec![Recompute::Block; stages.len()],
            stages,
            max_rows: longest,
            max_sequences: 1,
            threads: options.threads,
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

    /// Continues a prompt with the likeliest token, `max_new_tokens` times or until `stop_at` (which
    /// is not handed on) or the model's longest sequence. `emit` gets each token and the logits `[V]`
    /// it was chosen from; of equal logits the lower id wins.
    ///
    /// # Errors
    /// A stage failed.
    pub fn greedy(
        &mut self,
        prompt: &PromptRow,
        max_new_tokens: usize,
        stop_at: Option<u32>,
        emit: &mut dyn FnMut(u32, &[f32]),
    ) -> Result<(), GenerateError> {
        let mut batch = MicroBatch::from_prompts([prompt]);
        let mut filled = 0;
        let room = batch.tokens() + max_new_tokens;
        for _ in 0..max_new_tokens {
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
            let id = likeliest(&logits);
            if Some(id) == stop_at {
                break;
            }
            emit(id, &logits);
            batch = batch.continued(&[id]);
            let last = batch.position.iter().chain(&batch.block_position).max();
            if last.is_some_and(|&position| position as usize >= self.positions) {
                break;
            }
        }
        Ok(())
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

/// What kind of adapter a folder holds, by the file that says so.
fn adapter_section(folder: &std::path::Path) -> Result<AdapterSection, CheckpointError> {
    if folder.join("adapter_config.json").exists() {
        let config = LoraFiles::read(folder)?.config;
        return Ok(AdapterSection::Lora(LoraSection {
            r: config.r,
            lora_alpha: config.lora_alpha,
            lora_dropout: 0.0,
            target_modules: config.target_modules,
            init_adapter: None,
        }));
    }
    let prefix = PrefixFiles::read(folder)?;
    Ok(AdapterSection::Prefix(PrefixSection {
        pre_seq_len: prefix.pre_seq_len,
        prefix_projection: prefix.prefix_projection,
        prefix_dropout: 0.0,
        init_adapter: None,
    }))
}
