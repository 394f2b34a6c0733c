//! What is planned: a run as it would start, or one of a named model or of rows of one length.

use super::{PlanError, PlanOptions, wrapped};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, Quantization, RunConfig};
use crate::data::sampler::{MicroBatchSize, SamplerState};
use crate::model::trainables::Trainables;
use crate::model::weights;
use crate::pipeline::advice::{NoRoom, RowLengths, Wish};
use crate::pipeline::base::{Base, Layout, StartError};
use crate::pipeline::cost::TypicalBatch;
use crate::pipeline::fit::Demand;
use crate::pipeline::needs::DeviceMemory;
use crate::pipeline::prepare::{self, Prepared};

/// A run to be planned.
pub struct Subject {
    /// The model.
    pub model: ModelConfig,
    /// What is trained.
    pub trainables: Trainables,
    /// What it asks of its devices.
    pub demand: Demand,
    /// What they have.
    pub memory: Vec<DeviceMemory>,
    /// Who does what.
    pub layout: Layout,
    /// What is missing.
    pub no_room: Option<Box<NoRoom>>,
    /// What the rows are, in words.
    rows: String,
}

impl Subject {
    /// The run of `config`: with its model folder and its data, but where `options` say otherwise.
    ///
    /// # Errors
    /// Configuration, model or data do not fit together.
    pub fn open(config: &RunConfig, options: &PlanOptions) -> Result<Self, PlanError> {
        let Some(length) = options.sequence_length else {
            if let Some(size) = options.size {
                return Err(PlanError::NoRows { size: size.name() });
            }
            return Ok(Self::of_data(config)?);
        };
        let (model, tied) = match options.size {
            Some(size) => {
                let quantization = config.model.quantization;
                let model = ModelConfig {
                    quantization,
                    ..size.config()
                };
                let tied = model.tie_word_embeddings;
                (model, tied)
            }
            None => {
                let base = Base::open(&config.model.path, config.model.quantization)?;
                let tied = base.head_source.tied;
                (base.config, tied)
            }
        };
        let longest = model.max_sequence_length;
        if !(1..=longest).contains(&length) {
            let found = length;
            return Err(PlanError::SequenceLength { found, longest });
        }
        Ok(Self::of_rows(
            config,
            model,
            tied,
            length,
            options.target_share,
        )?)
    }

    fn of_data(config: &RunConfig) -> Result<Self, StartError> {
        let mut silent = |_| std::ops::ControlFlow::Continue(());
        let prepared = Prepared::survey(config, SamplerState::default(), &mut silent)?;
        let rows = &prepared.rows;
        Ok(Subject {
            rows: format!(
                "{} rows, {} tokens, {:.0} % of them with a target",
                rows.len(),
                rows.tokens(),
                100.0 * rows.target_share(),
            ),
            model: prepared.base.config,
            trainables: prepared.trainables,
            demand: prepared.demand,
            memory: prepared.memory,
            layout: prepared.layout,
            no_room: prepared.no_room,
        })
    }

    /// Rows of `length` tokens each.
    fn of_rows(
        config: &RunConfig,
        model: ModelConfig,
        tied: bool,
        length: usize,
        target_share: f64,
    ) -> Result<Self, StartError> {
        let trainables = Trainables::new(&model, &config.adapter, tied)?;
        let size = prepare::batching(config).size;
        let (sequences, tokens) = match size {
            MicroBatchSize::Rows(rows) => (rows, rows * length),
            MicroBatchSize::Tokens(budget) => ((budget / length).max(1), budget.max(length)),
        };
        let typical = TypicalBatch::new(sequences as f64, length as f64, target_share);
        let demand = prepare::demand(config, (tokens, sequences), typical);
        let pipeline = &config.pipeline;
        let memory = DeviceMemory::of(
            &pipeline.devices,
            pipeline.memory_per_device,
            pipeline.transport,
        )?;
        let wish = Wish {
            demand: &demand,
            model: &model,
            trainables: &trainables,
            memory: &memory,
            size,
            lengths: &RowLengths::uniform(length),
        };
        let (layout, no_room) = wish.settle()?;
        Ok(Subject {
            rows: format!(
                "rows of {length} tokens, {:.0} % of them with a target",
                100.0 * target_share
            ),
            model,
            trainables,
            demand,
            memory,
            layout,
            no_room,
        })
    }

    /// Model, adapter, rows and micro-batches in a few lines.
    pub fn title(&self) -> String {
        let model = &self.model;
        let tensors = weights::own_tensors(model, self.trainables.tied);
        let parameters: usize = tensors
            .iter()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let base = match model.quantization {
            Quantization::None => "",
            Quantization::Int8 => ", int8",
            Quantization::Int4 => ", int4",
        };
        let adapter = match &self.trainables.adapter {
            Some(AdapterSection::Lora(lora)) => {
                format!(
                    "LoRA of rank {} on {}",
                    lora.r,
                    lora.target_modules.join(", ")
                )
            }
            Some(AdapterSection::Prefix(prefix)) => {
                let projection = match prefix.prefix_projection {
                    true => " with projection",
                    false => "",
                };
                format!("prefix of {} positions{projection}", prefix.pre_seq_len)
            }
            Some(AdapterSection::Full(_)) => "whole model".to_owned(),
            None => "nothing".to_owned(),
        };
        let demand = &self.demand;
        wrapped(&format!(
            "{} blocks of {}, vocabulary {}{base}; {adapter}: {} of {parameters} parameters are trained",
            model.num_layers,
            model.hidden_size,
            model.vocab_size,
            self.trainables.count(),
        )) + &wrapped(&format!(
            "{}; {} micro-batches a step, of at most {} tokens in {} sequences",
            self.rows, demand.micro_batches, demand.max_rows, demand.max_sequences,
        ))
    }
}
