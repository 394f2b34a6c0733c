//! What each stage of a layout takes of its device: the numbers that the plan shows are those that the
//! run reserves.

use super::base::Layout;
use crate::backend::Sums;
use crate::backend::cuda::{self, GeluAt, LinearWork, MemoryPlan, OpRooms};
use crate::comm::{nccl, peer_copy};
use crate::config::architecture::Activation;
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, Device, Precision, TransportKind};
use crate::model::head::chunk_rows;
use crate::model::load::sums;
use crate::model::memory::{self, Inventory, Purpose, StageSizes};
use crate::model::names::{LinearSite, Names};
use crate::model::trainables::{self, Trainables, prefix_shape};

/// Bytes of a stage by purpose, each buffer rounded up as its device does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageBytes {
    /// Frozen tensors of the base model.
    pub weights: u64,
    /// Trained tensors: working copy, f32 master values, gradient, two moments; and room of their own.
    pub trainables: u64,
    /// Micro-batches in flight, all together.
    pub activations: u64,
    /// Micro-batches in flight.
    pub slots: u64,
    /// Room that all blocks share; on a GPU also scratch, tables and cuBLASLt's workspace.
    pub workspace: u64,
}

impl StageBytes {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights + self.trainables + self.activations + self.workspace
    }

    /// Bytes of one micro-batch in flight.
    pub fn slot(&self) -> u64 {
        self.activations / self.slots.max(1)
    }
}

/// By what activations travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exchange {
    /// NCCL.
    Nccl,
    /// Copies from device to device.
    PeerCopy,
    /// Copies to the host and from there.
    HostMemory,
}

/// To what a device rounds its buffers up.
fn granularity(device: Device) -> u64 {
    match device {
        Device::Cpu => 1,
        Device::Cuda(_) => cuda::ALIGNMENT as u64,
    }
}

impl Layout {
    /// Whether the stages' memory is taken at once when they start, as on GPUs.
    pub fn is_reserved(&self) -> bool {
        let mut devices = self.devices.iter();
        devices.all(|device| device.ordinal().is_some())
    }

    /// Sizes of stage `rank`.
    pub fn sizes(&self, rank: usize) -> StageSizes {
        let spec = &self.stages[rank];
        StageSizes {
            chunks: self.schedule.chunks(rank, &spec.chunks),
            exchanges: self.stages.len() > 1,
            embedding: spec.embedding,
            head: spec.head,
            max_rows: self.max_rows,
            max_sequences: self.max_sequences,
            micro_batches: self.schedule.micro_batches,
            element_size: match self.precision {
                Precision::F32 => 4,
                Precision::F16 => 2,
            },
        }
    }

    /// Every buffer of stage `rank`.
    pub fn inventory(
        &self,
        config: &ModelConfig,
        trainables: &Trainables,
        rank: usize,
    ) -> Inventory {
        let (sizes, recompute) = (self.sizes(rank), self.recompute[rank]);
        memory::stage_buffers(config, trainables, &sizes, recompute)
    }

    /// What stage `rank` takes of its device. `capability` is that of a GPU, times ten, where it is known.
    pub fn bytes(
        &self,
        config: &ModelConfig,
        trainables: &Trainables,
        rank: usize,
        capability: Option<u32>,
    ) -> StageBytes {
        let inventory = self.inventory(config, trainables, rank);
        let device = self.devices[rank];
        let of = |purpose| inventory.of(purpose, granularity(device));
        let chunks = self.sizes(rank).chunks;
        let exchanged = self.exchange_bytes(config, trainables, self.exchange());
        StageBytes {
            weights: of(Purpose::Weights),
            trainables: of(Purpose::Trainables),
            activations: of(Purpose::Activations),
            slots: chunks.iter().map(|chunk| chunk.slots as u64).sum(),
            workspace: of(Purpose::Workspace)
                + exchanged
                + match device {
                    Device::Cpu => 0,
                    Device::Cuda(_) => self.rooms(config, trainables, rank).bytes(capability),
                },
        }
    }

    /// The memory that stage `rank` takes of its GPU at once, for a run that exchanges by `exchange`.
    pub fn memory_plan(
        &self,
        config: &ModelConfig,
        trainables: &Trainables,
        rank: usize,
        exchange: Exchange,
    ) -> MemoryPlan {
        let inventory = self.inventory(config, trainables, rank);
        let buffers = inventory.total(granularity(self.devices[rank]));
        MemoryPlan {
            buffers: buffers + self.exchange_bytes(config, trainables, exchange),
            rooms: self.rooms(config, trainables, rank),
        }
    }

    /// How the stages will exchange, as far as that is known before libraries and GPUs are looked at;
    /// where it is not, the way that takes most.
    fn exchange(&self) -> Exchange {
        let gpus = self.is_reserved() && self.stages.len() > 1;
        match self.transport {
            _ if !gpus => Exchange::HostMemory,
            TransportKind::Nccl => Exchange::Nccl,
            TransportKind::Auto | TransportKind::P2p => Exchange::PeerCopy,
        }
    }

    /// Bytes of the buffers that a transport makes when it starts.
    fn exchange_bytes(
        &self,
        config: &ModelConfig,
        trainables: &Trainables,
        exchange: Exchange,
    ) -> u64 {
        let micro_batches = self.schedule.micro_batches;
        let (count, values) = match exchange {
            _ if self.stages.len() == 1 => (0, 0),
            Exchange::HostMemory => (0, 0),
            Exchange::Nccl => (1, nccl::WORDS),
            Exchange::PeerCopy => {
                let values = memory::all_reduce_len(config, trainables, micro_batches);
                (peer_copy::SUMS, values)
            }
        };
        let bytes = (values * size_of::<f32>()).next_multiple_of(cuda::ALIGNMENT);
        (count * bytes) as u64
    }

    /// What a GPU makes room for beside the buffers of stage `rank`.
    fn rooms(&self, config: &ModelConfig, trainables: &Trainables, rank: usize) -> OpRooms {
        let parameters = self.sizes(rank).parameters(config, trainables);
        let counted = parameters.iter().filter(|parameter| parameter.counted);
        let lora_rank = match &trainables.adapter {
            Some(AdapterSection::Lora(lora)) => lora.r,
            _ => 0,
        };
        let with_lora = self.linear_work(config, trainables, rank).into_iter();
        let with_lora = with_lora.filter(|layer| layer.lora);
        OpRooms {
            lora_rank,
            lora_widest: with_lora.map(|layer| layer.out_features).max().unwrap_or(0),
            rows: self.max_rows,
            sequences: self.max_sequences,
            heads: config.num_attention_heads,
            hidden_size: config.hidden_size,
            prefix_len: match &trainables.adapter {
                Some(AdapterSection::Prefix(prefix)) => prefix.pre_seq_len,
                _ => 0,
            },
            summed: counted.map(|parameter| parameter.len).collect(),
            updated: parameters.iter().map(|parameter| parameter.len).collect(),
        }
    }

    /// Every linear layer that stage `rank` computes.
    pub fn linear_work(
        &self,
        config: &ModelConfig,
        trainables: &Trainables,
        rank: usize,
    ) -> Vec<LinearWork> {
        let spec = &self.stages[rank];
        let h = config.hidden_size;
        let work = |in_features, out_features, bias, max_rows| LinearWork {
            in_features,
            out_features,
            bias,
            gelu: None,
            lora: false,
            max_rows,
            backward: true,
            weight_gradient: trainables.is_full(),
            single: false,
            sums: Sums::F32,
        };
        let names = Names::of(config);
        let layer = |site: LinearSite| {
            let (in_features, out_features) = site.features(config);
            let bias = site.has_bias(config);
            let gelu = match (config.architecture.activation, site) {
                (Activation::Gelu, LinearSite::HTo4h) => Some(GeluAt::Output),
                (Activation::Gelu, LinearSite::FourHToH) => Some(GeluAt::Input),
                _ => None,
            };
            let lora = trainables::lora_name(names, site, 0, "lora_A");
            LinearWork {
                gelu,
                sums: sums(self.product_sums),
                lora: trainables.find(&lora, None).is_some(),
                ..work(in_features, out_features, bias, self.max_rows)
            }
        };
        let mut all: Vec<LinearWork> = names.linear_sites().map(layer).collect();
        if spec.head {
            let rows = chunk_rows(config.vocab_size, self.max_rows);
            all.push(work(h, config.vocab_size, false, rows));
        }
        if let Some(AdapterSection::Prefix(prefix)) = &trainables.adapter
            && prefix.prefix_projection
        {
            let shape = prefix_shape(config, prefix.pre_seq_len);
            let layers = [(shape.embedding_width, h), (h, shape.width)];
            all.extend(layers.map(|(in_features, out_features)| LinearWork {
                weight_gradient: true,
                single: true,
                ..work(in_features, out_features, true, prefix.pre_seq_len)
            }));
        }
        all
    }
}

/// The memory of one device of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// The device.
    pub device: Device,
    /// Stages on it.
    pub stages: Vec<usize>,
    /// Bytes that the run may take of it; nothing where that is not known.
    pub bytes: Option<u64>,
    /// Whether more cannot be had: told by the user, or free on a GPU. What is available of the system's
    /// memory is an estimate that guides choices and refuses nothing.
    pub firm: bool,
    /// Bytes of them that are not planned to the byte: context and libraries of a GPU, NCCL. Estimates.
    pub own: u64,
    /// Compute capability of a GPU, times ten, where it is known.
    pub capability: Option<u32>,
}

impl DeviceMemory {
    /// Bytes for what is planned, of all its stages.
    pub fn room(&self) -> Option<u64> {
        self.bytes.map(|bytes| bytes.saturating_sub(self.own))
    }

    /// The memory of each of `devices`, in the order in which they are named first: `memory_per_device`,
    /// or what is free on it now. Where it is given no GPU is looked at, so that runs can be planned for
    /// GPUs that are elsewhere.
    ///
    /// # Errors
    /// A GPU cannot be asked.
    pub fn of(
        devices: &[Device],
        memory_per_device: Option<u64>,
        transport: TransportKind,
    ) -> Result<Vec<Self>, cuda::CudaError> {
        let mut all: Vec<DeviceMemory> = Vec::new();
        for (rank, &device) in devices.iter().enumerate() {
            match all.iter_mut().find(|memory| memory.device == device) {
                Some(memory) => memory.stages.push(rank),
                None => all.push(DeviceMemory {
                    device,
                    stages: vec![rank],
                    bytes: memory_per_device,
                    firm: memory_per_device.is_some(),
                    own: 0,
                    capability: None,
                }),
            }
        }
        for memory in &mut all {
            match memory.device {
                Device::Cpu if memory.bytes.is_none() => memory.bytes = free_host_memory(),
                Device::Cuda(ordinal) if memory.bytes.is_none() => {
                    let (free, capability) = cuda::free_memory(ordinal)?;
                    memory.bytes = Some(free);
                    memory.firm = true;
                    memory.capability = Some(capability);
                }
                _ => {}
            }
        }
        estimate_own(&mut all, transport);
        Ok(all)
    }

    /// The memory of the first `stages` stages alone.
    pub fn of_first(all: &[Self], stages: usize, transport: TransportKind) -> Vec<Self> {
        let mut first = all.to_vec();
        for memory in &mut first {
            memory.stages.retain(|&rank| rank < stages);
        }
        first.retain(|memory| !memory.stages.is_empty());
        estimate_own(&mut first, transport);
        first
    }
}

/// Enters what is not planned to the byte.
fn estimate_own(all: &mut [DeviceMemory], transport: TransportKind) {
    // NCCL is for distinct GPUs alone; each exchanges with the stages before and behind it.
    let distinct = all.iter().all(|memory| memory.stages.len() == 1);
    let peers = match transport == TransportKind::P2p || !distinct {
        true => 0,
        false => (all.len() as u64).saturating_sub(1).min(2),
    };
    for memory in all {
        memory.own = match memory.device {
            Device::Cpu => 0,
            Device::Cuda(_) => cuda::OWN_MEMORY + peers * cuda::NCCL_MEMORY_PER_PEER,
        };
    }
}

/// Memory that new work can use without swapping, as Linux estimates it; `None` elsewhere.
fn free_host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}
