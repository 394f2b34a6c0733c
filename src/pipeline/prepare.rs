//! Before any worker is started: model and data opened, stages laid out.

use super::base::{Base, Layout, StartError};
use super::partition;
use super::schedule::Schedule;
use crate::config::run::RunConfig;
use crate::data::pretokenised;
use crate::data::rows::Rows;
use crate::data::sampler::{Order, Sampler, SamplerState};
use crate::model::trainables::Trainables;

/// Model, data and layout of a run.
pub struct Prepared {
    /// The base model.
    pub base: Base,
    /// The training rows.
    pub rows: Rows,
    /// Rows that are not trained on, to measure the loss on.
    pub validation: Option<Rows>,
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
    pub fn open(config: &RunConfig, state: SamplerState) -> Result<Self, StartError> {
        let base = Base::open(&config.model.path)?;
        let rows = pretokenised::read_rows(&config.data.train.0[0], &base.config)?;
        let rows_len = rows.len();
        let trainables = Trainables::new(&base.config, &config.adapter, base.head_source.tied)?;
        let order = match config.data.shuffle {
            true => Order::Shuffled {
                seed: config.run.seed,
            },
            false => Order::AsGiven,
        };
        let sampler = Sampler::new(rows.len(), config.run.micro_batch_size, order, state)?;
        let pipeline = &config.pipeline;
        let head_cost = partition::head_cost(
            &base.config,
            rows.target_share(),
            pipeline.recompute,
            trainables.is_full(),
        );
        let balance = pipeline.balance.as_deref();
        let stages = base.stages(&pipeline.devices, balance, head_cost)?;
        let micro_batches = config.run.gradient_accumulation;
        let mut layout = Layout {
            devices: pipeline.devices.clone(),
            precision: config.model.precision,
            schedule: Schedule::build(pipeline.schedule, stages.len(), micro_batches),
            recompute: vec![pipeline.recompute; stages.len()],
            stages,
            max_rows: sampler.max_tokens(&rows),
            max_sequences: config.run.micro_batch_size.min(rows.len()),
            threads: pipeline.threads,
        };
        layout.choose_recompute(&base.config, &trainables, pipeline.memory_per_device)?;
        Ok(Prepared {
            base,
            rows,
            validation: None,
            trainables,
            layout,
            max_steps: max_steps(config, rows_len),
            sampler,
        })
    }
}

/// Steps of the run: as set, or as many as it takes to go through the rows `epochs` times.
fn max_steps(config: &RunConfig, rows: usize) -> u64 {
    let run = &config.run;
    let per_epoch = rows.div_ceil(run.micro_batch_size) as u64;
    let epochs = run.epochs.unwrap_or(1);
    let all = per_epoch.saturating_mul(epochs);
    run.max_steps
        .unwrap_or(all.div_ceil(run.gradient_accumulation as u64))
}
