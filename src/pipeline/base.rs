//! The base model of a run: its folder opened and checked, its blocks dealt out, its stages started.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use half::f16;

use super::advice::NoRoom;
use super::failure::Failure;
use super::launch::{Blueprint, Engine, InitialValues, launch};
use super::partition::{self, PartitionError, StageSpec};
use super::schedule::{Schedule, ScheduleError};
use super::transport::{self, GpuTransport};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{self, Cuda, CudaError, LinearWork, MemoryPlan};
use crate::backend::{BackendError, Pulse};
use crate::checkpoint::{CheckpointError, ModelFolder, TensorSource};
use crate::comm::{CommError, in_process, nccl, peer_copy};
use crate::config::error::ConfigError;
use crate::config::model::ModelConfig;
use crate::config::run::{Device, Precision, ProductSums, Quantization, Recompute, TransportKind};
use crate::data::DataError;
use crate::data::tokenizer::TokenizerError;
use crate::model::ModelError;
use crate::model::quantised;
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
    /// The schedule.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// A CUDA device cannot be used.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// CPU stages and GPU stages in one run.
    #[error(
        "--devices names cpu and GPUs together, and all stages of a run store and compute alike: use \
         GPUs alone or `cpu` alone"
    )]
    MixedDevices,
    /// Several stages on a GPU, and NCCL.
    #[error(
        "--devices names CUDA device {ordinal} more than once, and --transport nccl takes one stage per \
         GPU: leave --transport out (p2p is used then), or use NCCL 2.30.3 or newer with \
         NCCL_MULTI_RANK_GPU_ENABLE=1"
    )]
    SharedGpu {
        /// The device.
        ordinal: u32,
    },
    /// The stages cannot be connected.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A storage type that GPUs do not have here.
    #[error("precision = \"f32\" is for `--devices cpu`: on GPUs use precision = \"f16\"")]
    GpuPrecision,
    /// A device has not the memory that its stages need.
    #[error(transparent)]
    Memory(#[from] Box<NoRoom>),
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
            StartError::Cuda(error) => error.is_machine(),
            StartError::Comm(_) => true,
            StartError::Config(_)
            | StartError::Tokenizer(_)
            | StartError::TokenizerOf { .. }
            | StartError::Partition(_)
            | StartError::Schedule(_)
            | StartError::MixedDevices
            | StartError::GpuPrecision
            | StartError::SharedGpu { .. }
            | StartError::Memory(_) => false,
        }
    }
}

/// Refuses devices that cannot be used, before anything is read.
///
/// # Errors
/// GPUs beside the CPU, a precision that GPUs do not have, a GPU that is not there or lacks driver or
/// libraries, or a transport that cannot be had.
pub fn check_devices(
    devices: &[Device],
    precision: Precision,
    transport: TransportKind,
) -> Result<(), StartError> {
    let gpus = || devices.iter().filter_map(|device| device.ordinal());
    if gpus().next().is_none() {
        return Ok(());
    }
    if gpus().count() < devices.len() {
        return Err(StartError::MixedDevices);
    }
    if precision != Precision::F16 {
        return Err(StartError::GpuPrecision);
    }
    cuda::check(gpus())?;
    transport::check(transport, &gpus().collect::<Vec<u32>>())
}

/// How the stages of a run are laid out.
#[derive(Clone, Debug)]
pub struct Layout {
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// Storage type.
    pub precision: Precision,
    /// Rounding of the rotary tables.
    pub rotary_table: RotaryPrecision,
    /// What products of the frozen linear layers are summed in.
    pub product_sums: ProductSums,
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
    /// How activations travel between GPUs.
    pub transport: TransportKind,
    /// CPU threads for all stages together.
    pub threads: usize,
    /// Silence of a stage after which it counts as hung.
    pub stall_timeout: Duration,
}

/// What a stage's GPU is prepared for.
struct StagePlan {
    ordinal: Option<u32>,
    memory: MemoryPlan,
    work: Vec<LinearWork>,
}

impl StagePlan {
    /// The GPU with the stage's memory reserved and its products prepared.
    fn open(&self, pulse: &Arc<Pulse>) -> Result<Cuda, BackendError> {
        let cuda = Cuda::planned(self.ordinal.unwrap_or_default(), pulse, &self.memory)?;
        cuda.prepare_products(&self.work)?;
        Ok(cuda)
    }
}

impl Base {
    /// Opens a model folder and checks that it holds what `config.json` says, no more and no less. Its
    /// linear layers will be held as `quantization` says, or as a quantised folder has them.
    ///
    /// # Errors
    /// A file is missing or damaged; a tensor is missing, extra or misshapen; the folder has other
    /// codes than `quantization` asks for.
    pub fn open(path: &Path, quantization: Quantization) -> Result<Self, StartError> {
        let mut config = ModelConfig::from_json_file(&path.join("config.json"))?;
        let folder = ModelFolder::open(path)?;
        let head_source = weights::check(&folder, &config)?;
        config.quantization = quantised::chosen(quantization, config.quantization, path)?;
        Ok(Base {
            config,
            source: Arc::new(folder),
            head_source,
        })
    }

    /// Deals the blocks to `devices`, one chunk each: by `balance`, or by cost.
    ///
    /// # Errors
    /// The blocks cannot be dealt out so.
    pub fn stages(
        &self,
        devices: &[Device],
        virtual_stages: usize,
        balance: Option<&[usize]>,
        head_cost: f64,
    ) -> Result<Vec<StageSpec>, StartError> {
        Ok(match balance {
            Some(balance) => {
                partition::from_balance(balance, self.config.num_layers, virtual_stages)?
            }
            None => partition::by_cost(
                self.config.num_layers,
                devices.len(),
                virtual_stages,
                head_cost,
            )?,
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
        check_devices(&layout.devices, layout.precision, layout.transport)?;
        let stages = layout.stages.len();
        if layout.is_reserved() {
            let choice = transport::choose(layout.transport, &layout.devices)?;
            let exchange = choice.transport.exchange();
            let transfers = choice.transport.transfers();
            let planned = |rank: usize| StagePlan {
                ordinal: layout.devices[rank].ordinal(),
                memory: layout.memory_plan(&self.config, &trainables, rank, exchange),
                work: layout.linear_work(&self.config, &trainables, rank),
            };
            let planned: Vec<StagePlan> = (0..stages).map(planned).collect();
            let open = move |rank: usize, _, pulse: &Arc<Pulse>| planned[rank].open(pulse);
            // GPUs compute by themselves: no stage has to wait for a thread.
            let blueprint = self.blueprint(layout, trainables, initial, stages);
            let engine = match choice.transport {
                GpuTransport::Nccl(library) => {
                    launch(blueprint, nccl::connect(library, stages)?, open)?
                }
                GpuTransport::PeerCopy => launch(blueprint, peer_copy::connect(stages), open)?,
                GpuTransport::HostMemory => launch(blueprint, in_process::connect(stages), open)?,
            };
            return Ok(engine.over(choice.description, transfers));
        }
        let blueprint = self.blueprint(layout, trainables, initial, layout.threads);
        let transports = in_process::connect(stages);
        Ok(match layout.precision {
            Precision::F32 => launch(blueprint, transports, |_, n, pulse| {
                Cpu::<f32>::with_pulse(n, pulse)
            })?,
            Precision::F16 => launch(blueprint, transports, |_, n, pulse| {
                Cpu::<f16>::with_pulse(n, pulse)
            })?,
        })
    }

    /// Everything that the stages are made from.
    fn blueprint(
        &self,
        layout: &Layout,
        trainables: Trainables,
        initial: InitialValues,
        threads: usize,
    ) -> Blueprint {
        Blueprint {
            config: self.config.clone(),
            source: Arc::clone(&self.source),
            head_source: self.head_source.clone(),
            trainables,
            initial,
            stages: layout.stages.clone(),
            devices: layout.devices.clone(),
            schedule: layout.schedule.clone(),
            recompute: layout.recompute.clone(),
            max_rows: layout.max_rows,
            max_sequences: layout.max_sequences,
            rotary: layout.rotary_table,
            product_sums: layout.product_sums,
            threads,
            stall_timeout: layout.stall_timeout,
        }
    }
}
