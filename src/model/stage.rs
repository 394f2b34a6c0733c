//! The part of the model that one pipeline stage holds, and its forward and backward actions.

use std::ops::Range;
use std::sync::Arc;

use super::ModelError;
use super::activations::{ActivationShape, Slot, Workspace};
use super::attention::BlockPrefix;
use super::batch::{BatchLimits, BatchRows};
use super::block::{Block, Next, Shared};
use super::embedding::Embedding;
use super::head::{Head, HeadMatrix, Logits, LogitsRows};
use super::linear::Weight;
use super::load::Loader;
use super::names::Names;
use super::quantised::dequantised_len;
use super::rotary::{Rotary, RotaryPrecision};
use super::weights::HeadSource;
use crate::adapter::Parameter;
use crate::adapter::prefix::PrefixEncoder;
use crate::backend::{Backend, Pulse};
use crate::checkpoint::pieces::same_tensor;
use crate::config::run::{AdapterSection, Recompute};

/// What a stage holds and how much it must have room for.
#[derive(Clone, Debug)]
pub struct StageShape {
    /// The runs of blocks that it holds, ascending; one but for the interleaved schedule.
    pub chunks: Vec<ChunkShape>,
    /// Whether it holds the embedding.
    pub embedding: bool,
    /// Whether it holds the final norm, lm_head and the loss.
    pub head: bool,
    /// Tokens of the largest micro-batch.
    pub max_rows: usize,
    /// Sequences of the largest micro-batch.
    pub max_sequences: usize,
    /// What the backward pass computes again; not `auto`.
    pub recompute: Recompute,
    /// Rounding of the rotary tables.
    pub rotary: RotaryPrecision,
}

/// Consecutive blocks of a stage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkShape {
    /// Blocks of the model.
    pub blocks: Range<usize>,
    /// Micro-batches in flight through them.
    pub slots: usize,
}

/// A chunk's place among the blocks of the stage, and its micro-batches in flight.
struct Chunk<B: Backend> {
    blocks: Range<usize>,
    slots: Vec<Slot<B>>,
}

/// One stage of the model on its device.
pub struct Stage<B: Backend> {
    shape: StageShape,
    activations: ActivationShape,
    trains_embedding: bool,
    prefix_dropout: f32,
    embedding: Option<Embedding<B>>,
    blocks: Vec<Block<B>>,
    head: Option<Head<B>>,
    /// lm_head's matrix; nothing where it is the embedding of this stage, or on another stage.
    lm_head: Option<Weight<B>>,
    prefix: Option<PrefixEncoder<B>>,
    rotary: Rotary<B>,
    chunks: Vec<Chunk<B>>,
    pulse: Arc<Pulse>,
    workspace: Workspace<B>,
    /// The other half of a tied matrix's gradient: the head's on a single stage, else the peer's.
    tied_gradient: Option<B::Buffer<f32>>,
}

/// Keys and values of the tokens so far, for each block of the stage.
pub struct KeyValueCache<B: Backend> {
    blocks: Vec<B::Buffer<B::Element>>,
}

impl<B: Backend> Stage<B> {
    /// Reads the stage's tensors and makes its room.
    ///
    /// # Errors
    /// A tensor cannot be read, or the device has no memory.
    pub fn load(
        loader: &Loader<'_, B>,
        shape: StageShape,
        head_source: &HeadSource,
    ) -> Result<Self, ModelError> {
        let (backend, config) = (loader.backend, loader.config);
        let (trainables, names) = (loader.trainables, Names::of(config));
        let (lora_rank, lora_dropout, prefix_len, prefix_dropout) = match &trainables.adapter {
            Some(AdapterSection::Lora(lora)) => (lora.r, lora.lora_dropout > 0.0, 0, 0.0),
            Some(AdapterSection::Prefix(prefix)) => {
                (0, false, prefix.pre_seq_len, prefix.prefix_dropout)
            }
            Some(AdapterSection::Full(_)) | None => (0, false, 0, 0.0),
        };
        let activations = ActivationShape {
            limits: BatchLimits {
                rows: shape.max_rows,
                sequences: shape.max_sequences,
                vocab_size: config.vocab_size,
                positions: config.max_sequence_length,
            },
            hidden_size: config.hidden_size,
            inner_hidden_size: config.inner_hidden_size,
            mlp_width: config.mlp_width(),
            query_width: config.query_width(),
            splits_qkv: names.splits_qkv(),
            heads: config.num_attention_heads,
            prefix_len,
            key_value_width: config.key_value_width(),
            lora_rank,
            lora_dropout,
            dequantised: dequantised_len(config),
        };
        let full = trainables.is_full();
        let tied = full && head_source.tied;
        let embedding = match shape.embedding {
            true => Some(Embedding {
                weight: loader.weight(names.word_embeddings, head_source.embedding, true)?,
                hidden_size: config.hidden_size,
            }),
            false => None,
        };
        let (head, lm_head) = match shape.head {
            true => {
                let norm = loader.norm(names.final_norm)?;
                let head = Head::new(backend, norm, config.vocab_size, shape.max_rows)?;
                (Some(head), lm_head(loader, &shape, head_source)?)
            }
            false => (None, None),
        };
        let tied_gradient = match tied && (shape.embedding || shape.head) {
            true => Some(backend.zeros(config.vocab_size * config.hidden_size)?),
            false => None,
        };
        let mut blocks: Vec<Block<B>> = Vec::new();
        // Micro-batches in flight through each LoRA of the stage.
        let mut lora_slots = Vec::new();
        let mut chunks = Vec::with_capacity(shape.chunks.len());
        for (index, chunk) in shape.chunks.iter().enumerate() {
            let first = blocks.len();
            for layer in chunk.blocks.clone() {
                blocks.push(loader.block(layer)?);
            }
            let (count, recompute) = (chunk.blocks.len(), shape.recompute);
            let head = shape.head && index + 1 == shape.chunks.len();
            let loras = blocks[first..].iter_mut().flat_map(Block::loras_mut);
            for lora in loras {
                lora.set_place(lora_slots.len());
                lora_slots.push(chunk.slots);
            }
            let slot = |slot| Slot::new(backend, activations, slot, count, head, recompute);
            chunks.push(Chunk {
                blocks: first..blocks.len(),
                slots: (0..chunk.slots).map(slot).collect::<Result<_, _>>()?,
            });
        }
        let layers = shape.chunks.iter().flat_map(|chunk| chunk.blocks.clone());
        Ok(Stage {
            trains_embedding: full,
            prefix_dropout,
            embedding,
            blocks,
            head,
            lm_head,
            prefix: loader.prefix(layers)?,
            rotary: Rotary::new(
                backend,
                &config.architecture,
                config.head_dim,
                config.max_sequence_length,
                shape.rotary,
            )?,
            chunks,
            pulse: Arc::clone(loader.pulse),
            workspace: Workspace::new(backend, activations, &lora_slots)?,
            tied_gradient,
            activations,
            shape,
        })
    }

    /// What the stage holds.
    pub fn shape(&self) -> &StageShape {
        &self.shape
    }

    /// Indices in the model of the blocks of the stage, in their order on it.
    pub fn layers(&self) -> impl Iterator<Item = usize> + '_ {
        let chunks = self.shape.chunks.iter();
        chunks.flat_map(|chunk| chunk.blocks.clone())
    }

    /// Micro-batches that there is room for in a chunk, one at least.
    pub fn slots(&self, chunk: usize) -> usize {
        self.chunks[chunk].slots.len()
    }

    /// The micro-batch in a slot of a chunk and what it left.
    pub fn slot(&self, chunk: usize, slot: usize) -> &Slot<B> {
        &self.chunks[chunk].slots[slot]
    }

    /// Output of the last block of a chunk after [`Stage::forward`], `[T, H]`.
    pub fn output_mut(&mut self) -> &mut B::Buffer<f32> {
        &mut self.workspace.output
    }

    /// The same, to be read.
    pub fn output(&self) -> &B::Buffer<f32> {
        &self.workspace.output
    }

    /// Where the activations from the virtual stage before go: `[T, H]`.
    pub fn input_mut(&mut self, chunk: usize, slot: usize) -> &mut B::Buffer<f32> {
        &mut self.chunks[chunk].slots[slot].inputs[0]
    }

    /// Where the gradient from the virtual stage after goes, and after [`Stage::backward`] the
    /// gradient for the one before stands: `[T, H]`.
    pub fn gradient_mut(&mut self) -> &mut B::Buffer<B::Element> {
        &mut self.workspace.dout
    }

    /// H.
    pub fn hidden_size(&self) -> usize {
        self.activations.hidden_size
    }

    /// Values of one activation of the largest micro-batch, `T H`.
    pub fn largest_activation(&self) -> usize {
        self.activations.limits.rows * self.activations.hidden_size
    }

    /// Puts a micro-batch into a slot of a chunk.
    ///
    /// # Errors
    /// It does not fit, or an id or a position is out of range.
    pub fn fill(
        &mut self,
        backend: &B,
        chunk: usize,
        slot: usize,
        host: BatchRows<'_>,
    ) -> Result<(), ModelError> {
        self.chunks[chunk].slots[slot].batch.fill(backend, host)
    }

    /// Once per step: gradients cleared, prefix computed.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin_step(&mut self, backend: &B) -> Result<(), ModelError> {
        for parameter in self.parameters() {
            parameter.clear_gradient(backend)?;
        }
        if let Some(gradient) = &mut self.tied_gradient {
            let len = self.activations.limits.vocab_size * self.activations.hidden_size;
            backend.clear(gradient, len)?;
        }
        self.prepare_prefix(backend)
    }

    /// Computes the prefix from its parameters as they are now.
    ///
    /// # Errors
    /// When the device fails.
    pub fn prepare_prefix(&mut self, backend: &B) -> Result<(), ModelError> {
        if let Some(prefix) = &mut self.prefix {
            prefix.prepare(backend)?;
        }
        Ok(())
    }

    /// Forward of the micro-batch in a slot through the blocks of a chunk; in the model's first from its
    /// ids, else from what [`Stage::input_mut`] received. The output stands in [`Stage::output_mut`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &mut self,
        backend: &B,
        chunk: usize,
        slot: usize,
        mut cache: Option<&mut KeyValueCache<B>>,
    ) -> Result<(), ModelError> {
        let Chunk { blocks, slots } = &mut self.chunks[chunk];
        let Slot {
            batch,
            inputs,
            attention: kept_attention,
            dense: kept_dense,
            ..
        } = &mut slots[slot];
        let Workspace {
            output,
            attention,
            dense,
            scratch,
            ..
        } = &mut self.workspace;
        if let Some(embedding) = self.embedding.as_ref().filter(|_| chunk == 0) {
            embedding.forward(backend, &mut inputs[0], &batch.input_ids, batch.rows)?;
        }
        let shared = Shared {
            backend,
            rotary: &self.rotary,
            batch,
        };
        let in_chunk = &self.blocks[blocks.clone()];
        for (index, block) in in_chunk.iter().enumerate() {
            let (before, after) = inputs.split_at_mut(index + 1);
            let x = &before[index];
            let out = after.first_mut().unwrap_or(output);
            let attention = kept_attention.get_mut(index).unwrap_or(attention);
            let (dense, dense_of_next) = match kept_dense.get_mut(index..) {
                Some([own, others @ ..]) => (own, others.first_mut()),
                _ => (&mut *dense, None),
            };
            let next = in_chunk.get(index + 1).map(|block| Next {
                norm1: &block.norm1,
                dense: dense_of_next,
            });
            let ends = (index == 0, next);
            let place = blocks.start + index;
            let prefix = block_prefix(self.prefix.as_mut(), place, self.prefix_dropout);
            let cache = cache.as_mut().map(|cache| &mut cache.blocks[place]);
            let prefix = prefix.as_ref();
            block.forward(
                &shared, out, x, attention, dense, prefix, cache, ends, scratch,
            )?;
            self.pulse.beat();
        }
        Ok(())
    }

    /// Loss of the micro-batch in a slot, from [`Stage::output_mut`], and `scale` times its gradient,
    /// kept in the slot for [`Stage::backward`]. On the last stage.
    ///
    /// # Errors
    /// When the device fails.
    pub fn loss(&mut self, backend: &B, slot: usize, scale: f32) -> Result<(), ModelError> {
        let Slot {
            batch,
            loss_gradient,
            token_loss,
            ..
        } = &mut last_chunk(&mut self.chunks)[slot];
        let (Some(head), Some(dx), Some(loss)) = (&mut self.head, loss_gradient, token_loss) else {
            return Ok(());
        };
        let matrix = match (&mut self.lm_head, &self.embedding) {
            (Some(Weight::Trained(parameter)), _) => {
                let (values, gradient) = parameter.working_and_gradient();
                HeadMatrix {
                    values,
                    gradient: Some(gradient),
                }
            }
            (Some(Weight::Frozen(values)), _) => HeadMatrix {
                values,
                gradient: None,
            },
            (None, Some(embedding)) => HeadMatrix {
                values: embedding.weight.values(),
                gradient: self.tied_gradient.as_mut(),
            },
            (None, None) => return Ok(()),
        };
        let x = &self.workspace.output;
        Ok(head.loss(backend, matrix, loss, dx, x, batch, scale)?)
    }

    /// Logits on the chosen rows of the micro-batch in a slot, from [`Stage::output_mut`]; nothing on a
    /// stage without a head.
    ///
    /// # Errors
    /// When the device fails.
    pub fn logits(
        &mut self,
        backend: &B,
        slot: usize,
        rows: LogitsRows,
    ) -> Result<Option<Logits<B>>, ModelError> {
        let (slots, x) = (last_chunk(&mut self.chunks), &self.workspace.output);
        let batch = &slots[slot].batch;
        let matrix = match (&self.lm_head, &self.embedding) {
            (Some(weight), _) => weight.values(),
            (None, Some(embedding)) => embedding.weight.values(),
            (None, None) => return Ok(None),
        };
        match &mut self.head {
            Some(head) => Ok(Some(head.logits(backend, matrix, x, batch, rows)?)),
            None => Ok(None),
        }
    }

    /// Backward of the micro-batch in a slot of a chunk: from the loss's gradient in the model's last,
    /// else from what [`Stage::gradient_mut`] received; gradients of what is trained are added up, and the
    /// gradient of the chunk's input is left in [`Stage::gradient_mut`] where it is wanted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(&mut self, backend: &B, chunk: usize, slot: usize) -> Result<(), ModelError> {
        let Chunk { blocks, slots } = &mut self.chunks[chunk];
        let Slot {
            batch,
            inputs,
            attention: kept_attention,
            dense: kept_dense,
            loss_gradient,
            ..
        } = &mut slots[slot];
        let Workspace {
            dout,
            dx,
            attention,
            dense,
            scratch,
            ..
        } = &mut self.workspace;
        if let Some(loss_gradient) = loss_gradient {
            std::mem::swap(dout, loss_gradient);
        }
        let shared = Shared {
            backend,
            rotary: &self.rotary,
            batch,
        };
        let from_ids = self.shape.embedding && chunk == 0;
        let input_wanted = !from_ids || self.trains_embedding;
        let blocks = blocks.clone();
        for (index, block) in self.blocks[blocks.clone()].iter_mut().enumerate().rev() {
            let place = blocks.start + index;
            let x = &inputs[index];
            let mut prefix = self.prefix.as_mut();
            let dropout = self.prefix_dropout;
            match (kept_attention.get(index), kept_dense.get(index)) {
                (_, Some(_)) => {}
                (Some(kept), None) => block.recompute_dense(&shared, x, kept, dense, scratch)?,
                (None, None) => {
                    let prefix = block_prefix(prefix.as_deref_mut(), place, dropout);
                    let prefix = prefix.as_ref();
                    block.recompute_all(&shared, x, attention, dense, prefix, scratch)?;
                }
            }
            let attention = kept_attention.get(index).unwrap_or(attention);
            let dense = kept_dense.get(index).unwrap_or(dense);
            let wanted = index > 0 || input_wanted;
            let prefix = block_prefix(prefix, place, dropout);
            let dx_wanted = wanted.then_some(&mut *dx);
            block.backward(
                &shared, dx_wanted, dout, x, attention, dense, prefix, scratch,
            )?;
            std::mem::swap(dout, dx);
            self.pulse.beat();
        }
        if let Some(embedding) = self.embedding.as_mut().filter(|_| chunk == 0) {
            embedding.backward(backend, dout, &batch.input_ids, batch.rows)?;
        }
        Ok(())
    }

    /// The prefix encoder, where there is one.
    pub fn prefix_mut(&mut self) -> Option<&mut PrefixEncoder<B>> {
        self.prefix.as_mut()
    }

    /// Values of the gradient that the prefixes of all blocks share, `P H`; 0 where they share none.
    pub fn shared_gradient_len(&mut self) -> usize {
        let projection = self.prefix.as_mut().and_then(PrefixEncoder::projection_mut);
        projection.map_or(0, |projection| projection.hidden_len())
    }

    /// The tied matrix this stage holds, and the room for the other half of its gradient; nothing
    /// where none is trained.
    pub fn tied_mut(&mut self) -> Option<(&mut Parameter<B>, &mut B::Buffer<f32>)> {
        let room = self.tied_gradient.as_mut()?;
        let weight = match (&mut self.embedding, &mut self.lm_head) {
            (Some(embedding), _) => &mut embedding.weight,
            (None, Some(lm_head)) => lm_head,
            (None, None) => return None,
        };
        Some((weight.parameter()?, room))
    }

    /// Everything that is trained on this stage.
    pub fn parameters(&mut self) -> Vec<&mut Parameter<B>> {
        let mut all = Vec::new();
        if let Some(embedding) = &mut self.embedding {
            all.extend(embedding.weight.parameter());
        }
        for block in &mut self.blocks {
            all.extend(block.parameters());
        }
        if let Some(head) = &mut self.head {
            all.extend(head.norm.parameters());
        }
        if let Some(lm_head) = &mut self.lm_head {
            all.extend(lm_head.parameter());
        }
        if let Some(prefix) = &mut self.prefix {
            all.extend(prefix.parameters());
        }
        all
    }

    /// An empty key/value cache of `rows` rows for each block.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn cache(&self, backend: &B, rows: usize) -> Result<KeyValueCache<B>, ModelError> {
        let len = rows * self.activations.key_value_width;
        let block = |_| backend.zeros(len);
        Ok(KeyValueCache {
            blocks: (0..self.blocks.len())
                .map(block)
                .collect::<Result<_, _>>()?,
        })
    }
}

/// Slots of the chunk that ends in the head.
fn last_chunk<B: Backend>(chunks: &mut [Chunk<B>]) -> &mut [Slot<B>] {
    match chunks.last_mut() {
        Some(chunk) => &mut chunk.slots,
        None => &mut [],
    }
}

fn block_prefix<B: Backend>(
    prefix: Option<&mut PrefixEncoder<B>>,
    index: usize,
    dropout: f32,
) -> Option<BlockPrefix<'_, B>> {
    let prefix = prefix?;
    Some(BlockPrefix {
        shape: prefix.shape(),
        block: prefix.block_mut(index),
        dropout,
    })
}

/// lm_head of a last stage; nothing where it is the embedding of the same stage.
fn lm_head<B: Backend>(
    loader: &Loader<'_, B>,
    shape: &StageShape,
    source: &HeadSource,
) -> Result<Option<Weight<B>>, ModelError> {
    if shape.embedding {
        let same = || same_tensor(loader.source, source.embedding, source.head);
        let full = loader.trainables.is_full();
        if source.tied || (!full && same()?) {
            return Ok(None);
        }
    }
    // The copy on another stage than the embedding's is the same parameter, counted there.
    let names = Names::of(loader.config);
    let (name, counted) = match source.tied {
        true => (names.word_embeddings, false),
        false => (names.lm_head, true),
    };
    Ok(Some(loader.weight(name, source.head, counted)?))
}
