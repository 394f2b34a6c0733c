//! Before any worker is started: model and data opened, stages laid out.

use std::path::Path;
use std::time::Duration;

use super::advice::{NoRoom, RowLengths, Wish};
use super::base::{Base, Layout, StartError};
use super::cost::TypicalBatch;
use super::fit::Demand;
use super::needs::DeviceMemory;
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
    /// What the run asks of its devices.
    pub demand: Demand,
    /// What they have.
    pub memory: Vec<DeviceMemory>,
    /// The stages and what they do.
    pub layout: Layout,
    /// What is missing, where the devices have not the memory for it.
    pub no_room: Option<Box<NoRoom>>,
    /// The order of the rows.
    pub sampler: Sampler,
    /// Steps of the whole run.
    pub max_steps: u64,
}

impl Prepared {
    /// Opens model and data and decides who does what; the data goes on at `state`.
    ///
    /// # Errors
    /// Configuration, model or data do not fit together, or the run does not fit its devices.
    pub fn open(
        config: &RunConfig,
        state: SamplerState,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, StartError> {
        let mut prepared = Self::survey(config, state, on_progress)?;
        match prepared.no_room.take() {
            Some(no_room) => Err(no_room.into()),
            None => Ok(prepared),
        }
    }

    /// As [`Prepared::open`], but a run that does not fit its devices is no error.
    ///
    /// # Errors
    /// Configuration, model or data do not fit together.
    pub fn survey(
        config: &RunConfig,
        state: SamplerState,
        on_progress: OnProgress<'_>,
    ) -> Result<Self, StartError> {
        let base = Base::open(&config.model.path, config.model.quantization)?;
        let mut warnings: Vec<String> = base.head_source.warning.iter().cloned().collect();
        let tokenizer = open_tokenizer(&config.model.path, &base.config, &mut warnings)?;
        let settings = data_settings(config);
        // What does not depend on the rows is refused before they are read.
        let trainables = Trainables::new(&base.config, &config.adapter, base.head_source.tied)?;
        let pipeline = &config.pipeline;
        let memory = DeviceMemory::of(
            &pipeline.devices,
            pipeline.memory_per_device,
            pipeline.transport,
        )?;
        let unread = demand(config, (1, 1), TypicalBatch::new(1.0, 1.0, 1.0));
        unread.fit(&base.config, &trainables, &memory)?;
        let data = open_training_data(&settings, tokenizer.as_ref(), &base.config, on_progress)?;
        let is_text = !data.holds_token_ids;
        warnings.extend(data.notices());
        let TrainingData {
            train: rows,
            validation,
            ..
        } = data;
        let sampler = Sampler::over(&rows, batching(config), order(config), state)?;
        let micro_batches = config.run.gradient_accumulation;
        let longest = validation.iter().flat_map(Rows::lengths).max();
        let max_rows = sampler.max_tokens(&rows).max(longest.unwrap_or(0));
        let largest = (max_rows, sampler.max_sequences(&rows));
        let demand = demand(config, largest, typical(config, &rows));
        let wish = Wish {
            demand: &demand,
            model: &base.config,
            trainables: &trainables,
            memory: &memory,
            size: batching(config).size,
            lengths: &RowLengths::of(&rows, validation.as_ref()),
        };
        let (layout, no_room) = wish.settle()?;
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
            demand,
            memory,
            layout,
            no_room,
            sampler,
        })
    }
}

/// What a run with micro-batches of up to `largest` tokens and sequences asks of its devices.
pub fn demand(config: &RunConfig, largest: (usize, usize), typical: TypicalBatch) -> Demand {
    let pipeline = &config.pipeline;
    Demand {
        devices: pipeline.devices.clone(),
        transport: pipeline.transport,
        balance: pipeline.balance.clone(),
        precision: config.model.precision,
        rotary_table: config.model.rotary_table,
        product_sums: config.model.product_sums,
        schedule: pipeline.schedule,
        virtual_stages: pipeline.virtual_stages,
        micro_batches: config.run.gradient_accumulation,
        recompute: pipeline.recompute,
        threads: pipeline.threads,
        stall_timeout: Duration::from_secs(pipeline.stall_timeout),
        max_rows: largest.0,
        max_sequences: largest.1,
        typical,
    }
}

/// A micro-batch of rows of middling length.
fn typical(config: &RunConfig, rows: &Rows) -> TypicalBatch {
    let tokens = rows.tokens() as f64 / rows.len().max(1) as f64;
    let sequences = match batching(config).size {
        MicroBatchSize::Rows(size) => size.min(rows.len()) as f64,
        MicroBatchSize::Tokens(budget) => (budget as f64 / tokens.max(1.0)).max(1.0),
    };
    TypicalBatch::new(sequences, tokens, rows.target_share())
}

/// The tokenizer of a model's folder, if there is one: rows of token ids do without.
///
/// # Errors
/// A tokenizer that is damaged, or another model's.
pub fn open_tokenizer(
    folder: &Path,
    model: &ModelConfig,
    warnings: &mut Vec<String>,
) -> Result<Option<GlmTokenizer>, StartError> {
    let files = match TokenizerFiles::read(folder) {
        Ok(files) => files,
        Err(TokenizerError::NoFile { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let (tokenizer, era) = files
        .build(&ConfigIds::from(model), Some(model.vocab_size))
        .map_err(|source| StartError::TokenizerOf {
            folder: folder.to_owned(),
            source,
        })?;
    warnings.extend(era.iter().map(ToString::to_string));
    Ok(Some(tokenizer))
}

/// How a run reads its rows.
pub fn data_settings(config: &RunConfig) -> DataSettings {
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

/// How micro-batches are made of rows.
pub fn batching(config: &RunConfig) -> Batching {
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
