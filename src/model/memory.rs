//! Every buffer of a stage, from configuration alone: what the plan shows, the split of blocks is made
//! by and an arena is sized for.
//!
//! The list mirrors what `Stage::load`, `Agreement` and the mailboxes of a worker allocate, buffer by
//! buffer, because a device rounds each of them up; tests hold the two together to the byte.

use super::head::chunk_rows;
use super::names::Names;
use super::quantised::{self, dequantised_len};
use super::stage::ChunkShape;
use super::trainables::Trainables;
use super::weights::{self, NamedShape};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, Recompute};

/// Bytes of an f32, a u32.
const WORD: u64 = 4;

/// What decides the buffers of a stage beside the model.
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
    /// Micro-batches of a step.
    pub micro_batches: usize,
    /// Bytes of a stored element.
    pub element_size: usize,
}

/// A trained tensor of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageParameter {
    /// Values.
    pub len: usize,
    /// Whether this stage enters it into sums over all parameters; else another stage has it too.
    pub counted: bool,
}

impl StageSizes {
    /// Indices of its blocks in the model.
    fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.chunks.iter().flat_map(|chunk| chunk.blocks.clone())
    }

    /// How many blocks it holds.
    fn blocks(&self) -> u64 {
        self.layers().count() as u64
    }

    /// The base model's tensors that it holds, and whether it counts them.
    fn base_tensors(&self, config: &ModelConfig, tied: bool) -> Vec<(NamedShape, bool)> {
        let (v, h) = (config.vocab_size, config.hidden_size);
        let names = Names::of(config);
        let mut tensors = Vec::new();
        if self.embedding {
            tensors.push(((names.word_embeddings.to_owned(), vec![v, h]), true));
        }
        let in_blocks = self.layers();
        let in_blocks = in_blocks.flat_map(|layer| weights::block_tensors(config, layer));
        tensors.extend(in_blocks.map(|tensor| (tensor, true)));
        if self.head {
            let norm = weights::norm_tensors(config, names.final_norm);
            tensors.extend(norm.into_iter().map(|tensor| (tensor, true)));
            // An untied lm_head that happens to hold the embedding's very values is found out while it
            // is loaded, and takes nothing then; the plan leaves room for it.
            if !(self.embedding && tied) {
                tensors.push(((names.lm_head.to_owned(), vec![v, h]), !tied));
            }
        }
        tensors
    }

    /// Everything that is trained on the stage.
    pub fn parameters(&self, config: &ModelConfig, trainables: &Trainables) -> Vec<StageParameter> {
        if trainables.is_full() {
            let tensors = self.base_tensors(config, trainables.tied).into_iter();
            let parameter = |((_, shape), counted): (NamedShape, bool)| StageParameter {
                len: shape.iter().product(),
                counted,
            };
            return tensors.map(parameter).collect();
        }
        let is_prefix = matches!(trainables.adapter, Some(AdapterSection::Prefix(_)));
        let (shared, by_block): (Vec<_>, Vec<_>) = trainables
            .specs()
            .iter()
            .partition(|spec| is_prefix && spec.slice.is_none());
        let per_block = by_block.len() / config.num_layers.max(1);
        let shared = shared.into_iter().map(|spec| StageParameter {
            len: spec.len(),
            counted: self.embedding,
        });
        let own = self.layers().flat_map(|layer| {
            let specs = &by_block[layer * per_block..(layer + 1) * per_block];
            specs.iter().map(|spec| StageParameter {
                len: spec.len(),
                counted: true,
            })
        });
        shared.chain(own).collect()
    }
}

/// Values that all stages sum at most: partial norms and losses at the end of a step, and the gradient of
/// the layer that all blocks of a prefix projection share.
pub fn all_reduce_len(
    config: &ModelConfig,
    trainables: &Trainables,
    micro_batches: usize,
) -> usize {
    let shared = match &trainables.adapter {
        Some(AdapterSection::Prefix(prefix)) if prefix.prefix_projection => {
            prefix.pre_seq_len * config.hidden_size
        }
        _ => 0,
    };
    shared.max(trainables.specs().len() + micro_batches)
}

/// What buffers are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Frozen tensors of the base model.
    Weights,
    /// What is trained: working copy, f32 master values, gradient, two moments; and room of its own.
    Trainables,
    /// Micro-batches in flight: their ids and what the backward pass needs of them.
    Activations,
    /// Room that all blocks share, the head's, and what is exchanged with other stages.
    Workspace,
}

/// Buffers of one kind and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// What they are for.
    pub purpose: Purpose,
    /// What they hold.
    pub name: &'static str,
    /// Bytes of one.
    pub bytes: u64,
    /// How many there are.
    pub count: u64,
}

/// The buffers of a stage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    buffers: Vec<Buffers>,
}

impl Inventory {
    /// All of them.
    pub fn buffers(&self) -> &[Buffers] {
        &self.buffers
    }

    /// Bytes together, each buffer rounded up to a multiple of `granularity`.
    pub fn total(&self, granularity: u64) -> u64 {
        self.sum(granularity, |_| true)
    }

    /// Bytes of one purpose.
    pub fn of(&self, purpose: Purpose, granularity: u64) -> u64 {
        self.sum(granularity, |buffers| buffers.purpose == purpose)
    }

    fn sum(&self, granularity: u64, wanted: impl Fn(&Buffers) -> bool) -> u64 {
        let wanted = self.buffers.iter().filter(|buffers| wanted(buffers));
        wanted
            .map(|buffers| buffers.count * buffers.bytes.next_multiple_of(granularity))
            .sum()
    }

    fn add(&mut self, purpose: Purpose, name: &'static str, bytes: u64, count: u64) {
        self.buffers.push(Buffers {
            purpose,
            name,
            bytes,
            count,
        });
    }
}

/// The buffers of a stage with a given choice of recomputation (not `auto`).
pub fn stage_buffers(
    config: &ModelConfig,
    trainables: &Trainables,
    sizes: &StageSizes,
    recompute: Recompute,
) -> Inventory {
    let mut inventory = Inventory::default();
    if !trainables.is_full() {
        weights(&mut inventory, config, trainables, sizes);
    }
    trained(&mut inventory, config, trainables, sizes);
    slots(&mut inventory, config, trainables, sizes, recompute);
    workspace(&mut inventory, config, trainables, sizes);
    if sizes.head {
        head(&mut inventory, config, sizes);
    }
    inventory
}

fn weights(all: &mut Inventory, config: &ModelConfig, trainables: &Trainables, sizes: &StageSizes) {
    let e = sizes.element_size as u64;
    for ((name, shape), _) in sizes.base_tensors(config, trainables.tied) {
        let is_matrix_of_block = weights::is_block_matrix(config, &name, &shape);
        match (quantised::bits(config.quantization), &shape[..]) {
            (Some(bits), &[rows, cols]) if is_matrix_of_block => {
                let codes = rows * bits.row_bytes(cols);
                all.add(Purpose::Weights, "codes", codes as u64, 1);
                // The scales are halves whatever the storage type.
                all.add(Purpose::Weights, "scales", 2 * rows as u64, 1);
            }
            _ => {
                let values: usize = shape.iter().product();
                all.add(Purpose::Weights, "frozen tensor", e * values as u64, 1);
            }
        }
    }
}

fn trained(all: &mut Inventory, config: &ModelConfig, trainables: &Trainables, sizes: &StageSizes) {
    use Purpose::Trainables as Trained;
    let e = sizes.element_size as u64;
    for parameter in sizes.parameters(config, trainables) {
        let len = parameter.len as u64;
        all.add(Trained, "working copy", e * len, 1);
        let name = "master values, gradient, two moments";
        all.add(Trained, name, WORD * len, 4);
    }
    if trainables.is_full() && trainables.tied && (sizes.embedding || sizes.head) {
        let matrix = (config.vocab_size * config.hidden_size) as u64;
        all.add(
            Trained,
            "other gradient of the tied matrix",
            WORD * matrix,
            1,
        );
    }
    if let Some(AdapterSection::Prefix(prefix)) = &trainables.adapter
        && prefix.prefix_projection
    {
        let (p, h) = (prefix.pre_seq_len as u64, config.hidden_size as u64);
        let (hidden, key_value) = (p * h, p * config.key_value_width() as u64);
        all.add(Trained, "projection's hidden layer", WORD * hidden, 3);
        all.add(Trained, "keys and values in f32", WORD * key_value, 1);
        let blocks = sizes.blocks();
        all.add(Trained, "keys and values", e * key_value, blocks);
        all.add(Trained, "their gradient", WORD * key_value, blocks);
    }
    let agreement = trainables.specs().len() + sizes.micro_batches;
    let bytes = WORD * agreement as u64;
    all.add(Purpose::Workspace, "norms and losses of a step", bytes, 1);
}

/// `AttentionActivations::new`.
fn attention(config: &ModelConfig, sizes: &StageSizes) -> [(&'static str, u64); 4] {
    let (t, e) = (sizes.max_rows as u64, sizes.element_size as u64);
    let (h, n) = (config.hidden_size as u64, config.num_attention_heads as u64);
    let queries = config.query_width() as u64;
    let row = queries + config.key_value_width() as u64;
    [
        ("queries, keys and values", t * row * e),
        ("attention's output", t * queries * e),
        ("attention's sums", t * n * WORD),
        ("second norm's input", t * h * WORD),
    ]
}

/// `DenseActivations::new`.
fn dense(config: &ModelConfig, sizes: &StageSizes) -> [(&'static str, u64); 6] {
    let (t, e) = (sizes.max_rows as u64, sizes.element_size as u64);
    let (h, f) = (config.hidden_size as u64, config.inner_hidden_size as u64);
    [
        ("first norm's output", t * h * e),
        ("first norm's statistics", 2 * t * WORD),
        ("second norm's output", t * h * e),
        ("second norm's statistics", 2 * t * WORD),
        ("activation's input", t * config.mlp_width() as u64 * e),
        ("activation's output", t * f * e),
    ]
}

fn slots(
    all: &mut Inventory,
    config: &ModelConfig,
    trainables: &Trainables,
    sizes: &StageSizes,
    recompute: Recompute,
) {
    use Purpose::Activations;
    let (t, e) = (sizes.max_rows as u64, sizes.element_size as u64);
    let h = config.hidden_size as u64;
    for chunk in &sizes.chunks {
        let slots = chunk.slots as u64;
        let in_blocks = slots * chunk.blocks.len() as u64;
        all.add(Activations, "ids, positions, targets", t * WORD, 6 * slots);
        all.add(Activations, "block's input", t * h * WORD, in_blocks);
        if let Some(AdapterSection::Lora(lora)) = &trainables.adapter {
            // Two matrices each.
            let loras = trainables.specs().len() / (2 * config.num_layers.max(1));
            let bytes = t * lora.r as u64 * e;
            all.add(Activations, "LoRA's A(x)", bytes, in_blocks * loras as u64);
        }
        if matches!(recompute, Recompute::None | Recompute::AttentionFree) {
            for (name, bytes) in attention(config, sizes) {
                all.add(Activations, name, bytes, in_blocks);
            }
        }
        if recompute == Recompute::None {
            for (name, bytes) in dense(config, sizes) {
                all.add(Activations, name, bytes, in_blocks);
            }
        }
    }
    if let Some(last) = sizes.chunks.last().filter(|_| sizes.head) {
        let slots = last.slots as u64;
        all.add(Activations, "loss's gradient", t * h * e, slots);
        all.add(Activations, "loss of each target", t * WORD, slots);
    }
}

fn workspace(
    all: &mut Inventory,
    config: &ModelConfig,
    trainables: &Trainables,
    sizes: &StageSizes,
) {
    use Purpose::Workspace;
    let (t, e) = (sizes.max_rows as u64, sizes.element_size as u64);
    let (h, f) = (config.hidden_size as u64, config.inner_hidden_size as u64);
    all.add(Workspace, "output", t * h * WORD, 1);
    all.add(Workspace, "gradients that come and go", t * h * e, 2);
    let both = attention(config, sizes).into_iter();
    for (name, bytes) in both.chain(dense(config, sizes)) {
        all.add(Workspace, name, bytes, 1);
    }
    let queries = config.query_width() as u64;
    let key_value = config.key_value_width() as u64;
    all.add(Workspace, "branch and gradient of sums", t * h * e, 2);
    all.add(
        Workspace,
        "gradient of attention's output",
        t * queries * e,
        1,
    );
    all.add(
        Workspace,
        "gradient of qkv",
        t * (queries + key_value) * e,
        1,
    );
    if Names::of(config).splits_qkv() {
        all.add(
            Workspace,
            "queries, keys or values alone",
            t * queries * e,
            1,
        );
    }
    all.add(Workspace, "gradient of activation's output", t * f * e, 1);
    if config.architecture.gates() > 1 {
        let width = config.mlp_width() as u64;
        all.add(
            Workspace,
            "gradient of activation's input",
            t * width * e,
            1,
        );
    }
    match &trainables.adapter {
        Some(AdapterSection::Lora(lora)) => {
            all.add(
                Workspace,
                "gradient of LoRA's A(x)",
                t * lora.r as u64 * e,
                1,
            );
            if lora.lora_dropout > 0.0 {
                let widest = h.max(f).max(queries);
                all.add(Workspace, "LoRA's dropped input", t * widest * e, 2);
            }
        }
        Some(AdapterSection::Prefix(prefix)) => {
            let prefixes = (sizes.max_sequences * prefix.pre_seq_len) as u64;
            all.add(
                Workspace,
                "prefix per sequence",
                prefixes * key_value * e,
                1,
            );
            all.add(Workspace, "its gradient", prefixes * key_value * WORD, 1);
        }
        Some(AdapterSection::Full(_)) | None => {}
    }
    let dequantised = dequantised_len(config) as u64;
    all.add(Workspace, "weights out of their codes", dequantised * e, 1);
    let width = config.architecture.rotary_width(config.head_dim);
    let table = (config.max_sequence_length * (width / 2)) as u64;
    all.add(Workspace, "rotary tables", table * WORD, 2);
    if sizes.exchanges {
        all.add(Workspace, "activations sent and received", t * h * WORD, 2);
        all.add(Workspace, "gradients sent and received", t * h * e, 2);
    }
}

/// `Head::new`.
fn head(all: &mut Inventory, config: &ModelConfig, sizes: &StageSizes) {
    use Purpose::Workspace;
    let (t, e) = (sizes.max_rows as u64, sizes.element_size as u64);
    let (h, v) = (config.hidden_size as u64, config.vocab_size as u64);
    let c = chunk_rows(config.vocab_size, sizes.max_rows) as u64;
    all.add(Workspace, "head's row indices", t * WORD, 1);
    all.add(Workspace, "head's rows", c * h * WORD, 1);
    all.add(Workspace, "head's statistics", 2 * c * WORD, 1);
    all.add(Workspace, "head's norm and gradients", c * h * e, 3);
    all.add(Workspace, "logits", c * v * e, 1);
}
