//! What a run tells its GPU before it starts, so that no step allocates or loads anything.

use super::{Cuda, Result, attention, linear, norm};

/// Bytes of a GPU that a worker takes beside the buffers of its run: context, kernels, the workspace of
/// cuBLASLt, scratch.
pub const OWN_MEMORY: u64 = 600 << 20;

/// A linear layer that a run will compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearWork {
    /// I.
    pub in_features: usize,
    /// O.
    pub out_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
    /// Most rows at once.
    pub max_rows: usize,
    /// Whether the gradient of its input is computed.
    pub backward: bool,
    /// Whether the gradient of its weight is computed.
    pub weight_gradient: bool,
    /// Whether everything about it is f32, as in the projection of a prefix.
    pub single: bool,
}

/// The largest micro-batch of a run, and what else decides the room that ops need beside their buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LargestBatch {
    /// T, most tokens.
    pub rows: usize,
    /// S, most sequences.
    pub sequences: usize,
    /// Attention heads.
    pub heads: usize,
    /// H.
    pub hidden_size: usize,
    /// P, keys of a prefix; 0 without one.
    pub prefix_len: usize,
}

impl Cuda {
    /// Takes `bytes` bytes for the buffers of a run at once, and 1 MiB for their rounding. What does
    /// not fit there, and what is made after the run has started, has an allocation of its own.
    ///
    /// # Errors
    /// The GPU has not that much memory.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        self.memory.reserve(bytes as usize)
    }

    /// Takes the room that ops need beside their buffers, so that nothing is allocated when a later
    /// micro-batch is larger than those before it.
    ///
    /// # Errors
    /// The GPU has not that much memory.
    pub fn prepare_batches(&self, batch: &LargestBatch) -> Result<()> {
        attention::prepare(self, batch)?;
        norm::prepare(self, batch)
    }

    /// Runs every product of `layers` once for every number of rows that has an algorithm of its own,
    /// so that no kernel is loaded in the middle of a step. What the reserved memory holds is lost: to
    /// be called before anything is put there.
    ///
    /// # Errors
    /// A product has no algorithm.
    pub fn prepare_products(&self, layers: &[LinearWork]) -> Result<()> {
        let Some((at, bytes)) = self.memory.arena() else {
            return Ok(());
        };
        for layer in layers {
            linear::prepare(self, layer, at, bytes)?;
        }
        self.device.synchronize()
    }
}
