//! The part of the model that one pipeline stage holds, and its forward and backward actions.

use std::ops::Range;

use super::ModelError;
use super::activations::{ActivationShape, Slot, Workspace};
use super::attention::BlockPrefix;
use super::batch::{BatchLimits, BatchRows};
use super::block::{Block, Shared};
use super::embedding::Embedding;
use super::head::{Head, HeadMatrix, Logits, LogitsRows};
use super::linear::Weight;
use super::load::Loader;
use super::quantised::dequantised_len;
use super::rotary::{Rotary, RotaryPrecision};
use super::weights::{FINAL_NORM, HeadSource, LM_HEAD, WORD_EMBEDDINGS};
use crate::adapter::Parameter;
use crate::adapter::prefix::PrefixEncoder;
use crate::backend::Backend;
use crate::checkpoint::pieces::same_tensor;
use crate::config::run::{AdapterSection, Recompute};

/// What a stage holds and how much it must have room for.
#[derive(Clone, Debug)]
pub struct StageShape {
    /// Blocks of the model.
    pub blocks: Range<usize>,
    /// Whether it holds the embedding.
    pub embedding: bool,
    /// Whether it holds the final norm, lm_head and the loss.
    pub head: bool,
    /// Tokens of the largest micro-batch.
    pub max_rows: usize,
    /// Sequences of the largest micro-batch.
    pub max_sequences: usize,
    /// Micro-batches in flight.
    pub slots: usize,
    /// What the backward pass computes again; not `auto`.
    pub recompute: Recompute,
    /// Rounding of the rotary tables.
    pub rotary: RotaryPrecision,
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
    slots: Vec<Slot<B>>,
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
        let trainables = loader.trainables;
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
            heads: config.num_attention_heads,
            prefix_len,
            key_value_width: 2 * config.hidden_size,
            lora_rank,
            lora_dropout,
            dequantised: dequantised_len(config),
        };
        let full = trainables.is_full();
        let tied = full && head_source.tied;
        let embedding = match shape.embedding {
            true => Some(Embedding {
                weight: loader.weight(WORD_EMBEDDINGS, head_source.embedding, true)?,
                hidden_size: config.hidden_size,
            }),
            false => None,
        };
        let (head, lm_head) = match shape.head {
            true => {
                let norm = loader.norm(FINAL_NORM)?;
                let head = Head::new(backend, norm, config.vocab_size, shape.max_rows)?;
                (Some(head), lm_head(loader, &shape, head_source)?)
            }
            false => (None, None),
        };
        let tied_gradient = match tied && (shape.embedding || shape.head) {
            true => Some(backend.zeros(config.vocab_size * config.hidden_size)?),
            false => None,
        };
        let blocks = shape.blocks.len();
        let slot = |_| Slot::new(backend, activations, blocks, shape.head, shape.recompute);
        Ok(Stage {
            trains_embedding: full,
            prefix_dropout,
            embedding,
            blocks: shape
                .blocks
                .clone()
                .map(|layer| loader.block(layer))
                .collect::<Result<_, _>>()?,
            head,
            lm_head,
            prefix: loader.prefix(shape.blocks.clone())?,
            rotary: Rotary::new(
                backend,
                config.head_dim(),
                config.max_sequence_length,
                shape.rotary,
            )?,
            slots: (0..shape.slots).map(slot).collect::<Result<_, _>>()?,
            workspace: Workspace::new(backend, activations)?,
            tied_gradient,
            activations,
            shape,
        })
    }

    /// What the stage holds.
    pub fn shape(&self) -> &StageShape {
        &self.shape
    }

    /// The micro-batch in a slot and what it left.
    pub fn slot(&self, slot: usize) -> &Slot<B> {
        &self.slots[slot]
    }

    /// Output of the last block after [`Stage::forward`], `[T, H]`.
    pub fn output(&self) -> &B::Buffer<f32> {
        &self.workspace.output
    }

    /// Where the activations from the stage before go: `[T, H]`.
    pub fn input_mut(&mut self, slot: usize) -> &mut B::Buffer<f32> {
        &mut self.slots[slot].inputs[0]
    }

    /// Where the gradient from the stage after goes, and after [`Stage::backward`] the gradient for
    /// the stage before stands: `[T, H]`.
    pub fn gradient_mut(&mut self) -> &mut B::Buffer<B::Element> {
        &mut self.workspace.dout
    }

    /// Values of one activation of the micro-batch in a slot, `T H`.
    pub fn activation_len(&self, slot: usize) -> usize {
        self.slots[slot].batch.rows * self.activations.hidden_size
    }

    /// Whether the stage before wants the gradient of this stage's input.
    pub fn sends_gradient(&self) -> bool {
        !self.shape.embedding
    }

    /// Puts a micro-batch into a slot.
    ///
    /// # Errors
    /// It does not fit, or an id or a position is out of range.
    pub fn fill(
        &mut self,
        backend: &B,
        slot: usize,
        host: BatchRows<'_>,
    ) -> Result<(), ModelError> {
        self.slots[slot].batch.fill(backend, host)
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

    /// Forward of the micro-batch in a slot through the blocks; on the first stage from its ids, else
    /// from what [`Stage::input_mut`] received. The output stands in [`Stage::output`].
    ///
    /// # Errors
    /// When the device fails.
    pub fn forward(
        &mut self,
        backend: &B,
        slot: usize,
        mut cache: Option<&mut KeyValueCache<B>>,
    ) -> Result<(), ModelError> {
        let Slot {
            batch,
            inputs,
            attention: kept_attention,
            dense: kept_dense,
            ..
        } = &mut self.slots[slot];
        let Workspace {
            output,
            attention,
            dense,
            scratch,
            ..
        } = &mut self.workspace;
        if let Some(embedding) = &self.embedding {
            embedding.forward(backend, &mut inputs[0], &batch.input_ids, batch.rows)?;
        }
        let shared = Shared {
            backend,
            rotary: &self.rotary,
            batch,
        };
        for (index, block) in self.blocks.iter().enumerate() {
            let (before, after) = inputs.split_at_mut(index + 1);
            let x = &before[index];
            let out = after.first_mut().unwrap_or(output);
            let attention = kept_attention.get_mut(index).unwrap_or(attention);
            let dense = kept_dense.get_mut(index).unwrap_or(dense);
            let prefix = block_prefix(self.prefix.as_mut(), index, self.prefix_dropout);
            let cache = cache.as_mut().map(|cache| &mut cache.blocks[index]);
            let prefix = prefix.as_ref();
            block.forward(&shared, out, x, attention, dense, prefix, cache, scratch)?;
        }
        Ok(())
    }

    /// Loss of the micro-batch in a slot, from [`Stage::output`], and `scale` times its gradient,
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
        } = &mut self.slots[slot];
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

    /// Logits on the chosen rows of the micro-batch in a slot, from [`Stage::output`]; nothing on a
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
        let (batch, x) = (&self.slots[slot].batch, &self.workspace.output);
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

    /// Backward of the micro-batch in a slot: from the loss's gradient on the last stage, else from
    /// what [`Stage::gradient_mut`] received; gradients of what is trained are added up, and the
    /// gradient of the stage's input is left in [`Stage::gradient_mut`] where it is wanted.
    ///
    /// # Errors
    /// When the device fails.
    pub fn backward(&mut self, backend: &B, slot: usize) -> Result<(), ModelError> {
        let Slot {
            batch,
            inputs,
            attention: kept_attention,
            dense: kept_dense,
            loss_gradient,
            ..
        } = &mut self.slots[slot];
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
        let input_wanted = !self.shape.embedding || self.trains_embedding;
        for (index, block) in self.blocks.iter_mut().enumerate().rev() {
            let x = &inputs[index];
            let mut prefix = self.prefix.as_mut();
            let dropout = self.prefix_dropout;
            match (kept_attention.get(index), kept_dense.get(index)) {
                (_, Some(_)) => {}
                (Some(kept), None) => block.recompute_dense(&shared, x, kept, dense, scratch)?,
                (None, None) => {
                    let prefix = block_prefix(prefix.as_deref_mut(), index, dropout);
                    let prefix = prefix.as_ref();
                    block.recompute_all(&shared, x, attention, dense, prefix, scratch)?;
                }
            }
            let attention = kept_attention.get(index).unwrap_or(attention);
            let dense = kept_dense.get(index).unwrap_or(dense);
            let wanted = index > 0 || input_wanted;
            let prefix = block_prefix(prefix, index, dropout);
            let dx_wanted = wanted.then_some(&mut *dx);
            block.backward(
                &shared, dx_wanted, dout, x, attention, dense, prefix, scratch,
            )?;
            std::mem::swap(dout, dx);
        }
        if let Some(embedding) = &mut self.embedding {
            embedding.backward(backend, dout, &batch.input_ids, batch.rows)?;
        }
        Ok(())
    }

    /// The prefix encoder, where there is one.
    pub fn prefix_mut(&mut self) -> Option<&mut PrefixEncoder<B>> {
        self.prefix.as_mut()
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
    let (name, counted) = match source.tied {
        true => (WORD_EMBEDDINGS, false),
        false => (LM_HEAD, true),
    };
    Ok(Some(loader.weight(name, source.head, counted)?))
}
