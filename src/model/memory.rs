//! Bytes of a stage, from configuration alone.
//!
//! The terms mirror what `Stage::load` allocates, field by field; a test holds them together.

use super::head::chunk_rows;
use super::quantised::{self, dequantised_len};
use super::stage::ChunkShape;
use super::trainables::Trainables;
use super::weights::{self, LinearSite};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, Recompute};

/// What decides the bytes of a stage beside the model.
#[derive(Clone, Debug)]
pub struct StageSizes {
    /// Its blocks, with the micro-batches in flight through them.
    pub chunks: Vec<ChunkShape>,
    /// Whether it exchanges activations with other stages.
    pub exchanges: bool,
    /// Whether it holds the embedding.
    pub embedding: bool,
    /// Whether it holds lm_head and the loss.
    pub head: bool,
    /// T of the largest micro-batch.
    pub max_rows: usize,
    /// S of the largest micro-batch.
    pub max_sequences: usize,
    /// Bytes of a stored element.
    pub element_size: usize,
}

impl StageSizes {
    /// Indices of its blocks in the model.
    fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.chunks.iter().flat_map(|chunk| chunk.blocks.clone())
    }
}

/// Bytes of a stage by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageBytes {
    /// Frozen tensors of the base model.
    pub weights: u64,
    /// Trained tensors: working copy, f32 master values, gradient, two moments.
    pub trainables: u64,
    /// Saved activations of all slots.
    pub slots: u64,
    /// Room shared by all blocks, and the head's.
    pub workspace: u64,
}

impl StageBytes {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.weights + self.trainables + self.slots + self.workspace
    }
}

/// Bytes that a stage takes with a given choice of recomputation (not `auto`).
pub fn stage_bytes(
    config: &ModelConfig,
    trainables: &Trainables,
    sizes: &StageSizes,
    recompute: Recompute,
) -> StageBytes {
    let (t, h, f) = (
        sizes.max_rows as u64,
        config.hidden_size as u64,
        config.inner_hidden_size as u64,
    );
    let (v, n) = (config.vocab_size as u64, config.num_attention_heads as u64);
    let e = sizes.element_size as u64;
    let attention = t * (3 * h * e + h * e + 4 * n + 4 * h);
    let dense = t * (2 * h * e + 2 * f * e + 16);
    let kept = match recompute {
        Recompute::None => attention + dense,
        Recompute::AttentionFree => attention,
        Recompute::Block | Recompute::Auto => 0,
    };
    let batch = 6 * 4 * t;
    let block_slot = 4 * t * h + kept;
    let in_chunks: u64 = sizes
        .chunks
        .iter()
        .map(|chunk| chunk.slots as u64 * (batch + chunk.blocks.len() as u64 * block_slot))
        .sum();
    let last_slots = sizes.chunks.last().map_or(0, |chunk| chunk.slots as u64);
    let head_slots = if sizes.head {
        last_slots * t * (h * e + 4)
    } else {
        0
    };

    let (rank, dropout, prefix_len) = match &trainables.adapter {
        Some(AdapterSection::Lora(lora)) => (lora.r as u64, lora.lora_dropout > 0.0, 0),
        Some(AdapterSection::Prefix(prefix)) => (0, false, prefix.pre_seq_len as u64),
        Some(AdapterSection::Full(_)) | None => (0, false, 0),
    };
    let prefix = sizes.max_sequences as u64 * prefix_len * 2 * h;
    let scratch = t * e * (3 * h + 3 * h + f) + prefix * (e + 4);
    let lora = t * e * (2 * rank + if dropout { 2 * h.max(f) } else { 0 });
    let c = chunk_rows(config.vocab_size, sizes.max_rows) as u64;
    let head = match sizes.head {
        true => 4 * t + c * (4 * h + 8 + 3 * h * e + v * e),
        false => 0,
    };
    let rotary = 8 * config.max_sequence_length as u64 * (config.head_dim() as u64 / 4);
    let mailboxes = if sizes.exchanges {
        2 * t * h * (4 + e)
    } else {
        0
    };
    let dequantised = dequantised_len(config) as u64 * e;
    let workspace = t * (4 * h + 2 * h * e)
        + attention
        + dense
        + scratch
        + lora
        + dequantised
        + head
        + rotary
        + mailboxes;
    StageBytes {
        weights: weight_bytes(config, trainables, sizes),
        trainables: trainable_bytes(config, trainables, sizes),
        slots: in_chunks + head_slots,
        workspace,
    }
}

/// Values of the base model's tensors that the stage holds.
fn base_values(config: &ModelConfig, tied: bool, sizes: &StageSizes) -> u64 {
    let count = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    let in_blocks: u64 = sizes
        .layers()
        .flat_map(|layer| weights::block_tensors(config, layer))
        .map(|(_, shape)| count(&shape))
        .sum();
    let matrix = count(&[config.vocab_size, config.hidden_size]);
    let matrices = match (sizes.embedding, sizes.head) {
        (true, true) if tied => 1,
        (embedding, head) => u64::from(embedding) + u64::from(head),
    };
    let final_norm = if sizes.head {
        2 * config.hidden_size as u64
    } else {
        0
    };
    in_blocks + matrices * matrix + final_norm
}

fn weight_bytes(config: &ModelConfig, trainables: &Trainables, sizes: &StageSizes) -> u64 {
    if trainables.is_full() {
        return 0;
    }
    let element_size = sizes.element_size as u64;
    let stored = base_values(config, trainables.tied, sizes) * element_size;
    let Some(bits) = quantised::bits(config.quantization) else {
        return stored;
    };
    // In place of the values: codes, and a half per row.
    let saved = LinearSite::ALL.into_iter().map(|site| {
        let (cols, rows) = site.features(config);
        (rows * cols) as u64 * element_size - (rows * (bits.row_bytes(cols) + 2)) as u64
    });
    stored - sizes.layers().count() as u64 * saved.sum::<u64>()
}

fn trainable_bytes(config: &ModelConfig, trainables: &Trainables, sizes: &StageSizes) -> u64 {
    let per_value = sizes.element_size as u64 + 16;
    let matrix = (config.vocab_size * config.hidden_size) as u64;
    if trainables.is_full() {
        let ends = sizes.embedding || sizes.head;
        let tied_room = if trainables.tied && ends {
            4 * matrix
        } else {
            0
        };
        return base_values(config, trainables.tied, sizes) * per_value + tied_room;
    }
    let share = sizes.layers().count() as u64;
    let layers = config.num_layers as u64;
    let all = trainables.specs().iter();
    let (shared, by_block): (Vec<_>, Vec<_>) = all.partition(|spec| {
        matches!(trainables.adapter, Some(AdapterSection::Prefix(_))) && spec.slice.is_none()
    });
    let count = |specs: Vec<&crate::adapter::ParameterSpec>| {
        specs.into_iter().map(|spec| spec.len() as u64).sum::<u64>()
    };
    let values = count(shared) + count(by_block) / layers * share;
    let rooms = match &trainables.adapter {
        Some(AdapterSection::Prefix(prefix)) if prefix.prefix_projection => {
            let (p, h) = (prefix.pre_seq_len as u64, config.hidden_size as u64);
            4 * p * h + 8 * p * h + share * 2 * p * h * (sizes.element_size as u64 + 4)
        }
        _ => 0,
    };
    values * per_value + rooms
}

/// The cheapest recomputation that fits into `budget` bytes, and whether it does: `none`, then
/// `attention_free`, then `block`, which is returned also when nothing fits.
pub fn choose_recompute(
    config: &ModelConfig,
    trainables: &Trainables,
    sizes: &StageSizes,
    budget: u64,
) -> (Recompute, bool) {
    let fits = |recompute| stage_bytes(config, trainables, sizes, recompute).total() <= budget;
    for recompute in [Recompute::None, Recompute::AttentionFree] {
        if fits(recompute) {
            return (recompute, true);
        }
    }
    (Recompute::Block, fits(Recompute::Block))
}
