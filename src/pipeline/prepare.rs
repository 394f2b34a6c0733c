//! Before any worker is started: model and data opened, stages laid out.

use std::time::Duration;

use super::base::{Base, Layout, StartError};
use super::partition;
use super::schedule::Schedule;
use super::template::template_settings;
use crate::config::model::ModelConfig;
use crate::config::run::{BadRowPolicy, RunConfig};
use crate::data::cache::OnProgress;
use crate::data::rows::Rows;
use crate::data::sampler::{Batching, MicroBatchSize, Order, Sampler, SamplerState};
use crate::data::template::TemplateSettings;
use crate::data::text_rows::BadRows;
use crate::data::tokenizer::{ConfigIds, GlmTokenizer, TokenizerError, TokenizerFiles};
use crate::data::training_data::{DataSettings, TrainingData, open_training_data};
use crate::model::trainables::Trainables;

/// Model, data and layout of a run.
pub struct Prepared {
    /// The base model.
    pub base: Base,
    /// The training rows.
    pub rows: Rows,
    /// Rows that are not trained on, to measure the loss on.
    pub validation: Option<Rows>,
    /// What text rows became; nothing where the rows are token ids.
    pub template: Option<TemplateSettings>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// What is trained.
    pub trainables: Trainables,
    /// The stages and what they do.
    pub layout: Layout,
    /// The order of the rows.
    pub sampler: Sampler,
    /// Steps of the whole run.
    pub max_steps: u64,
}

impl Prepared {
    /// Opens model and data and decides who does what; the data goes on at `state`.
    ///
    /// # Errors
    /// Configuration, model or data do not fit together.
    pub fn open(
        config: &RunConfig,
        state: SamplerState,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, StartError> {
        let base = Base::open(&config.model.path, config.model.quantization)?;
        let mut warnings: Vec<String> = base.head_source.warning.iter().cloned().collect();
        let tokenizer = open_tokenizer(config, &base.config, &mut warnings)?;
        let settings = data_settings(config);
        // What does not depend on the rows is refused before they are read.
        let trainables = Trainables::new(&base.config, &config.adapter, base.head_source.tied)?;
        let pipeline = &config.pipeline;
        let balance = pipeline.balance.as_deref();
        let head_cost = |target_share| {
            let full = trainables.is_full();
            partition::head_cost(&base.config, target_share, pipeline.recompute, full)
        };
        base.stages(
            &pipeline.devices,
            pipeline.virtual_stages,
            balance,
            head_cost(1.0),
        )?;
        let data = open_training_data(&settings, tokenizer.as_ref(), &base.config, on_progress)?;
        let is_text = !data.holds_token_ids;
        warnings.extend(data.notices());
        let TrainingData {
            train: rows,
            validation,
            ..
        } = data;
        let sampler = Sampler::over(&rows, batching(config), order(config), state)?;
        let head_cost = head_cost(rows.target_share());
        let stages = base.stages(
            &pipeline.devices,
            pipeline.virtual_stages,
            balance,
            head_cost,
        )?;
        let micro_batches = config.run.gradient_accumulation;
        let longest = validation.iter().flat_map(Rows::lengths).max();
        let mut layout = Layout {
            devices: pipeline.devices.clone(),
            precision: config.model.precision,
            rotary_table: config.model.rotary_table,
            schedule: Schedule::build(
                pipeline.schedule,
                stages.len(),
                pipeline.virtual_stages,
                micro_batches,
            )?,
            recompute: vec![pipeline.recompute; stages.len()],
            stages,
            max_rows: sampler.max_tokens(&rows).max(longest.unwrap_or(0)),
            max_sequences: sampler.max_sequences(&rows),
            transport: pipeline.transport,
            threads: pipeline.threads,
            stall_timeout: Duration::from_secs(pipeline.stall_timeout),
        };
        layout.choose_recompute(&base.config, &trainables, pipeline.memory_per_device)?;
        let epochs = config.run.epochs.unwrap_or(1);
        let max_steps = config.run.max_steps;
        Ok(Prepared {
            max_steps: max_steps.unwrap_or_else(|| sampler.steps(epochs, micro_batches)),
            template: is_text.then_some(settings.template),
            base,
            rows,
            validation,
            warnings,
            trainables,
            layout,
            sampler,
        })
    }
}

/// The tokenizer of the model's folder, if there is one: rows of token ids do without.
fn open_tokenizer(
    config: &RunConfig,
    model: &ModelConfig,
    warnings: &mut Vec<String>,
) -> Result<Option<GlmTokenizer>, StartError> {
    let files = match TokenizerFiles::read(&config.model.path) {
        Ok(files) => files,
        Err(TokenizerError::NoFile { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let (tokenizer, era) = files
        .build(&ConfigIds::from(model), Some(model.vocab_size))
        .map_err(|source| StartError::TokenizerOf {
            folder: config.model.path.clone(),
            source,
        })?;
    warnings.extend(era.iter().map(ToString::to_string));
    Ok(Some(tokenizer))
}

fn data_settings(config: &RunConfig) -> DataSettings {
    let data = &config.data;
    let cache = data.cache.clone();
    DataSettings {
        train: data.train.0.clone(),
        validation: data.validation.0.clone(),
        validation_split: data.validation_split,
        seed: config.run.seed,
        template: template_settings(data),
        bad_rows: match data.bad_rows {
            BadRowPolicy::Fatal => BadRows::Fatal,
            BadRowPolicy::Skip => BadRows::Skip,
        },
        cache_token_ids: cache.is_some(),
        cache_dir: Some(cache.unwrap_or_else(|| config.run.output.join("cache"))),
        threads: config.pipeline.threads,
    }
}

fn order(config: &RunConfig) -> Order {
    match config.data.shuffle {
        true => Order::Shuffled {
            seed: config.run.seed,
        },
        false => Order::AsGiven,
    }
}

fn batching(config: &RunConfig) -> Batching {
    let size = match config.run.micro_batch_tokens {
        Some(tokens) => MicroBatchSize::Tokens(tokens),
        None => MicroBatchSize::Rows(config.run.micro_batch_size),
    };
    Batching {
        size,
        bucket_window: config
            .data
            .bucket_by_length
            .then_some(Batching::BUCKET_WINDOW),
    }
}
