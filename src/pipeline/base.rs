//! The base model of a run: its folder opened and checked, its blocks dealt out, its stages started.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::f16;

use super::failure::Failure;
use super::launch::{Blueprint, Engine, InitialValues, launch};
use super::partition::{self, PartitionError, StageSpec};
use super::schedule::Schedule;
use crate::backend::cpu::Cpu;
use crate::checkpoint::{CheckpointError, ModelFolder, TensorSource};
use crate::comm::in_process;
use crate::config::error::ConfigError;
use crate::config::model::ModelConfig;
use crate::config::run::{Device, Precision, Recompute};
use crate::data::DataError;
use crate::data::tokenizer::TokenizerError;
use crate::model::ModelError;
use crate::model::memory::{self, StageSizes};
use crate::model::rotary::RotaryPrecision;
use crate::model::trainables::Trainables;
use crate::model::weights::{self, HeadSource};

/// A model folder, opened and checked.
pub struct Base {
    /// `config.json`.
    pub config: ModelConfig,
    /// The weights.
    pub source: Arc<dyn TensorSource>,
    /// Where embedding and head come from.
    pub head_source: HeadSource,
}

/// Why stages could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// `config.json`.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weight files.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The training rows.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A tokenizer that is not the one of its model.
    #[error("{folder}: {source}", folder = folder.display())]
    TokenizerOf {
        /// The model folder.
        folder: PathBuf,
        /// What does not fit.
        source: TokenizerError,
    },
    /// The partition.
    #[error(transparent)]
    Partition(#[from] PartitionError),
    /// A device that this build cannot use.
    #[error(
        "device {device}: this build has no CUDA backend yet; use `--devices cpu`, once per stage"
    )]
    NoCuda {
        /// As asked for.
        device: Device,
    },
    /// Not enough memory for any choice of recomputation.
    #[error(
        "stage {rank} needs {needed} bytes even with recomputation of whole blocks, and {budget} are \
         available: use more devices, a smaller micro_batch_size or shorter rows"
    )]
    Memory {
        /// The stage.
        rank: usize,
        /// Bytes with `recompute = "block"`.
        needed: u64,
        /// Bytes allowed.
        budget: u64,
    },
    /// A worker.
    #[error(transparent)]
    Failure(#[from] Failure),
}

impl StartError {
    /// Whether the machine or a bug is to blame, not the user's files or settings.
    pub fn is_machine(&self) -> bool {
        match self {
            StartError::Failure(failure) => failure.is_machine(),
            StartError::Checkpoint(error) => error.is_machine(),
            StartError::Model(error) => error.is_machine(),
            StartError::Data(error) => error.is_machine(),
            StartError::Config(_)
            | StartError::Tokenizer(_)
            | StartError::TokenizerOf { .. }
            | StartError::Partition(_)
            | StartError::NoCuda { .. }
            | StartError::Memory { .. } => false,
        }
    }
}

/// Refuses devices that this build cannot use, before anything is read.
///
/// # Errors
/// The first such device.
pub fn check_devices(devices: &[Device]) -> Result<(), StartError> {
    match devices.iter().find(|device| **device != Device::Cpu) {
        Some(&device) => Err(StartError::NoCuda { device }),
        None => Ok(()),
    }
}

/// How the stages of a run are laid out.
#[derive(Clone, Debug)]
pub struct Layout {
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// Storage type.
    pub precision: Precision,
    /// The stages.
    pub stages: Vec<StageSpec>,
    /// The order of actions.
    pub schedule: Schedule,
    /// What each stage recomputes.
    pub recompute: Vec<Recompute>,
    /// Tokens of the largest micro-batch.
    pub max_rows: usize,
    /// Sequences of the largest micro-batch.
    pub max_sequences: usize,
    /// CPU threads for all stages together.
    pub threads: usize,
}

impl Layout {
    /// Sizes of stage `rank`, for planning its memory.
    pub fn sizes(&self, rank: usize) -> StageSizes {
        let spec = &self.stages[rank];
        StageSizes {
            blocks: spec.blocks.clone(),
            embedding: spec.embedding,
            head: spec.head,
            max_rows: self.max_rows,
            max_sequences: self.max_sequences,
            slots: self.schedule.slots(rank).max(1),
            element_size: match self.precision {
                Precision::F32 => 4,
                Precision::F16 => 2,
            },
        }
    }

    /// Replaces `auto` by the cheapest choice that fits into each stage's share of the memory:
    /// `memory_per_device`, or what the system says is available.
    ///
    /// # Errors
    /// Nothing fits into a `memory_per_device` that was given.
    pub fn choose_recompute(
        &mut self,
        config: &ModelConfig,
        trainables: &Trainables,
        memory_per_device: Option<u64>,
    ) -> Result<(), StartError> {
        let available = available_memory().map(|bytes| bytes / self.stages.len() as u64);
        let Some(budget) = memory_per_device.or(available) else {
            for recompute in &mut self.recompute {
                if *recompute == Recompute::Auto {
                    *recompute = Recompute::Block;
                }
            }
            return Ok(());
        };
        for rank in 0..self.stages.len() {
            if self.recompute[rank] != Recompute::Auto {
                continue;
            }
            let sizes = self.sizes(rank);
            let (choice, fits) = memory::choose_recompute(config, trainables, &sizes, budget);
            if !fits && memory_per_device.is_some() {
                let bytes = memory::stage_bytes(config, trainables, &sizes, choice);
                return Err(StartError::Memory {
                    rank,
                    needed: bytes.total(),
                    budget,
                });
            }
            self.recompute[rank] = choice;
        }
        Ok(())
    }
}

/// Memory that new work can use without swapping, as Linux estimates it; `None` elsewhere.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

impl Base {
    /// Opens a model folder and checks that it holds what `config.json` says, no more and no less.
    ///
    /// # Errors
    /// A file is missing or damaged; a tensor is missing, extra or misshapen.
    pub fn open(path: &Path) -> Result<Self, StartError> {
        let config = ModelConfig::from_json_file(&path.join("config.json"))?;
        let folder = ModelFolder::open(path)?;
        let head_source = weights::check(&folder, &config)?;
        Ok(Base {
            config,
            source: Arc::new(folder),
            head_source,
        })
    }

    /// Deals the blocks to `devices`: by `balance`, or by cost.
    ///
    /// # Errors
    /// The blocks cannot be dealt out so.
    pub fn stages(
        &self,
        devices: &[Device],
        balance: Option<&[usize]>,
        head_cost: f64,
    ) -> Result<Vec<StageSpec>, StartError> {
        Ok(match balance {
            Some(balance) => partition::from_balance(balance, self.config.num_layers)?,
            None => partition::by_cost(self.config.num_layers, devices.len(), head_cost)?,
        })
    }

    /// Loads all stages, each on a thread of its own.
    ///
    /// # Errors
    /// A device that this build cannot use, or the first stage that failed.
    pub fn start(
        &self,
        layout: &Layout,
        trainables: Trainables,
        initial: InitialValues,
    ) -> Result<Engine, StartError> {
        check_devices(&layout.devices)?;
        let blueprint = Blueprint {
            config: self.config.clone(),
            source: Arc::clone(&self.source),
            head_source: self.head_source.clone(),
            trainables,
            initial,
            stages: layout.stages.clone(),
            schedule: layout.schedule.clone(),
            recompute: layout.recompute.clone(),
            max_rows: layout.max_rows,
            max_sequences: layout.max_sequences,
            rotary: match layout.precision {
                Precision::F32 => RotaryPrecision::F32,
                Precision::F16 => RotaryPrecision::Original,
            },
            threads: layout.threads,
        };
        let transports = in_process::connect(layout.stages.len());
        Ok(match layout.precision {
            Precision::F32 => launch(blueprint, transports, |_, n| Cpu::<f32>::new(n))?,
            Precision::F16 => launch(blueprint, transports, |_, n| Cpu::<f16>::new(n))?,
        })
    }
}
