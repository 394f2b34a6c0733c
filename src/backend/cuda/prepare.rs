//! What a run tells its GPU before it starts, so that no step allocates or loads anything.

use std::sync::Arc;

use super::memory::rounded;
use super::{Cuda, Result, adapter, attention, blas, linear, norm, optim};
use crate::backend::{Pulse, Sums};

/// Bytes of a GPU that a worker takes beside what is planned to the byte: its context, the kernels, the
/// libraries' own. An estimate, and why a plan leaves headroom: about half a gigabyte is what contexts
/// with cuBLASLt are known to show in `nvidia-smi`, more on GPUs with more processors.
pub const OWN_MEMORY: u64 = 512 << 20;

/// Bytes that NCCL takes for each GPU it exchanges with. An estimate: each flow has a communicator of up to
/// four channels, and a channel keeps 4 MiB (`NCCL_BUFFSIZE`), with other protocols up to 9.2 MiB, in each
/// direction. That is 64 to 147 MiB; this lies between.
pub const NCCL_MEMORY_PER_PEER: u64 = 96 << 20;

/// Where a linear layer has GELU beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeluAt {
    /// GELU is taken of what comes out.
    Output,
    /// What goes in came out of GELU.
    Input,
}

/// A linear layer that a run will compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearWork {
    /// I.
    pub in_features: usize,
    /// O.
    pub out_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// GELU, where it may be part of the product.
    pub gelu: Option<GeluAt>,
    /// Whether a LoRA stands beside it, to whose share its products add.
    pub lora: bool,
    /// Most rows at once.
    pub max_rows: usize,
    /// Whether the gradient of its input is computed.
    pub backward: bool,
    /// Whether the gradient of its weight is computed.
    pub weight_gradient: bool,
    /// Whether everything about it is f32, as in the projection of a prefix.
    pub single: bool,
    /// How the products of its weight add, but for those of the weight's gradient.
    pub sums: Sums,
}

/// What the ops of a run need beside its buffers: tables of sequences and tensors, scratch, cuBLASLt's
/// workspace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpRooms {
    /// T, most tokens of a micro-batch.
    pub rows: usize,
    /// S, most sequences of a micro-batch.
    pub sequences: usize,
    /// Attention heads.
    pub heads: usize,
    /// H.
    pub hidden_size: usize,
    /// P, keys of a prefix; 0 without one.
    pub prefix_len: usize,
    /// r of LoRA; 0 without.
    pub lora_rank: usize,
    /// Outputs of the widest layer with a LoRA.
    pub lora_widest: usize,
    /// Values of each tensor whose squares are summed at the end of a step.
    pub summed: Vec<usize>,
    /// Values of each tensor that is updated then.
    pub updated: Vec<usize>,
}

impl OpRooms {
    /// Bytes that they take on a GPU of compute capability `capability` / 10; with `None` on any.
    pub fn bytes(&self, capability: Option<u32>) -> u64 {
        let single = [blas::workspace_bytes(capability), self.scratch_bytes()];
        let tables = attention::table_words(self)
            .into_iter()
            .chain(optim::table_words(self));
        let tables = tables.map(|words| words * size_of::<u32>());
        let all = single.into_iter().chain(tables).map(rounded);
        all.sum::<usize>() as u64
    }

    /// The most scratch that any op takes.
    fn scratch_bytes(&self) -> usize {
        let wanted = [
            attention::scratch_bytes(self),
            norm::scratch_bytes(self),
            adapter::scratch_bytes(self),
            optim::scratch_bytes(self),
        ];
        // Scratch is kept in words.
        let most = wanted.into_iter().max().unwrap_or_default();
        most.next_multiple_of(size_of::<u32>())
    }
}

/// The memory of a run on one GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Bytes of all buffers, each rounded up to [`ALIGNMENT`](super::ALIGNMENT).
    pub buffers: u64,
    /// What its ops need beside them.
    pub rooms: OpRooms,
}

impl Cuda {
    /// The GPU with all memory of a run taken at once. Buffers, tables and scratch come from there; what
    /// does not fit, and what is made after the run has started, has an allocation of its own.
    ///
    /// # Errors
    /// As [`Cuda::new`], or the GPU has not that much memory.
    pub fn planned(ordinal: u32, pulse: &Arc<Pulse>, plan: &MemoryPlan) -> Result<Self> {
        let cuda = Cuda::open(ordinal, pulse, Some(plan))?;
        attention::reserve(&cuda, &plan.rooms)?;
        optim::reserve(&cuda, &plan.rooms)?;
        cuda.scratch(plan.rooms.scratch_bytes())?;
        Ok(cuda)
    }

    /// Runs every product of `layers` once for every number of rows that has an algorithm of its own,
    /// so that no kernel is loaded in the middle of a step; over planned memory that holds nothing yet.
    ///
    /// # Errors
    /// A product has no algorithm.
    pub fn prepare_products(&self, layers: &[LinearWork]) -> Result<()> {
        let Some((at, bytes)) = self.memory.unused() else {
            return Ok(());
        };
        for layer in layers {
            linear::prepare(self, layer, at, bytes)?;
        }
        self.device.synchronize()
    }
}
