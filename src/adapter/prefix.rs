//! The prefix encoder of P-Tuning v2 (Liu et al. 2021): trained keys and values for every block.
//!
//! Names as in THUDM's checkpoints: without projection `embedding.weight [P, L 2 G D]` is cut by
//! block; with it a row is `trans.2(tanh(trans.0(embedding)))`, where `trans.2` is cut by block and
//! lives with its block, while `embedding` and `trans.0` are held by every stage alike. As in the
//! original, the encoder computes in f32 whatever the storage type of the model is.

use super::Parameter;
use crate::backend::{Backend, BackendError, LinearShape, Sums};

/// Sizes of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrefixShape {
    /// P, number of positions (`pre_seq_len`).
    pub len: usize,
    /// Width of the embedding in front of a projection: H in ChatGLM-6B, `L 2 G D` in ChatGLM2.
    pub embedding_width: usize,
    /// H, width of the projection.
    pub hidden_size: usize,
    /// 2 G D, keys and values of one block and position.
    pub width: usize,
}

impl PrefixShape {
    fn hidden(&self) -> LinearShape {
        LinearShape {
            rows: self.len,
            in_features: self.embedding_width,
            out_features: self.hidden_size,
            sums: Sums::F32,
        }
    }

    fn output(&self) -> LinearShape {
        LinearShape {
            rows: self.len,
            in_features: self.hidden_size,
            out_features: self.width,
            sums: Sums::F32,
        }
    }
}

/// The part of the projection that all blocks share, held by every stage.
pub struct SharedProjection<B: Backend> {
    /// `embedding.weight [P, E]`, E the embedding's width.
    pub embedding: Parameter<B>,
    /// `trans.0.weight [H, E]`.
    pub weight: Parameter<B>,
    /// `trans.0.bias [H]`.
    pub bias: Parameter<B>,
    /// `tanh(trans.0(embedding))`, `[P, H]`.
    hidden: B::Buffer<f32>,
    /// Gradient of the hidden layer, `[P, H]`, before that of tanh is taken.
    dhidden: B::Buffer<f32>,
    /// One block's part of it.
    part: B::Buffer<f32>,
}

/// What one block holds of the prefix.
pub enum PrefixBlock<B: Backend> {
    /// Its columns of the embedding, which are its keys and values, `[P, 2 G D]`.
    Embedding(Parameter<B>),
    /// Its rows of `trans.2`, with the keys and values they give and the gradient of these.
    Projection {
        /// `[2 G D, H]`.
        weight: Parameter<B>,
        /// `[2 G D]`.
        bias: Parameter<B>,
        /// `[P, 2 G D]`, for this step.
        key_value: B::Buffer<B::Element>,
        /// `[P, 2 G D]`, added up over the micro-batches of this step.
        gradient: B::Buffer<f32>,
    },
}

impl<B: Backend> PrefixBlock<B> {
    /// Keys and values of this step, `[P, 2 G D]`.
    pub fn key_value(&self) -> &B::Buffer<B::Element> {
        match self {
            PrefixBlock::Embedding(embedding) => embedding.working(),
            PrefixBlock::Projection { key_value, .. } => key_value,
        }
    }

    /// Where backward actions add the gradient of [`PrefixBlock::key_value`].
    pub fn accumulate(&mut self) -> &mut B::Buffer<f32> {
        match self {
            PrefixBlock::Embedding(embedding) => embedding.accumulate(),
            PrefixBlock::Projection { gradient, .. } => gradient,
        }
    }

    /// The trainable tensors of this block.
    pub fn parameters(&mut self) -> Vec<&mut Parameter<B>> {
        match self {
            PrefixBlock::Embedding(embedding) => vec![embedding],
            PrefixBlock::Projection { weight, bias, .. } => vec![weight, bias],
        }
    }
}

/// The prefix of the blocks of one stage.
pub struct PrefixEncoder<B: Backend> {
    shape: PrefixShape,
    shared: Option<SharedProjection<B>>,
    blocks: Vec<PrefixBlock<B>>,
    /// f32 room for one block's keys and values before they are rounded.
    room: B::Buffer<f32>,
}

impl<B: Backend> PrefixEncoder<B> {
    /// A prefix without projection; `embeddings` are the columns of each block of the stage.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn plain(
        backend: &B,
        shape: PrefixShape,
        embeddings: Vec<Parameter<B>>,
    ) -> Result<Self, BackendError> {
        Ok(PrefixEncoder {
            shape,
            shared: None,
            blocks: embeddings.into_iter().map(PrefixBlock::Embedding).collect(),
            room: backend.zeros(0)?,
        })
    }

    /// A prefix with projection: `[embedding, trans.0.weight, trans.0.bias]`, and the rows of
    /// `trans.2` of each block as (weight, bias).
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn projected(
        backend: &B,
        shape: PrefixShape,
        [embedding, weight, bias]: [Parameter<B>; 3],
        outputs: Vec<(Parameter<B>, Parameter<B>)>,
    ) -> Result<Self, BackendError> {
        let len = shape.len * shape.width;
        let block = |(weight, bias)| {
            Ok(PrefixBlock::Projection {
                weight,
                bias,
                key_value: backend.zeros(len)?,
                gradient: backend.zeros(len)?,
            })
        };
        Ok(PrefixEncoder {
            shape,
            shared: Some(SharedProjection {
                embedding,
                weight,
                bias,
                hidden: backend.zeros(shape.len * shape.hidden_size)?,
                dhidden: backend.zeros(shape.len * shape.hidden_size)?,
                part: backend.zeros(shape.len * shape.hidden_size)?,
            }),
            blocks: outputs
                .into_iter()
                .map(block)
                .collect::<Result<_, BackendError>>()?,
            room: backend.zeros(len)?,
        })
    }

    /// Sizes.
    pub fn shape(&self) -> PrefixShape {
        self.shape
    }

    /// What block `index` of the stage holds.
    pub fn block(&self, index: usize) -> &PrefixBlock<B> {
        &self.blocks[index]
    }

    /// What block `index` of the stage holds.
    pub fn block_mut(&mut self, index: usize) -> &mut PrefixBlock<B> {
        &mut self.blocks[index]
    }

    /// All trainable tensors of this stage's prefix.
    pub fn parameters(&mut self) -> Vec<&mut Parameter<B>> {
        let shared = self
            .shared
            .iter_mut()
            .flat_map(|shared| [&mut shared.embedding, &mut shared.weight, &mut shared.bias]);
        let blocks = self.blocks.iter_mut().flat_map(PrefixBlock::parameters);
        shared.chain(blocks).collect()
    }

    /// Computes the keys and values of every block from the parameters as they are now, and clears
    /// the gradients of them. Once per step, before the first action.
    ///
    /// # Errors
    /// When the device fails.
    pub fn prepare(&mut self, backend: &B) -> Result<(), BackendError> {
        let Some(shared) = &mut self.shared else {
            return Ok(());
        };
        let shape = self.shape;
        let (embedding, weight) = (shared.embedding.master(), shared.weight.master());
        let bias = Some(shared.bias.master());
        backend.linear(
            &mut shared.hidden,
            embedding,
            weight,
            bias,
            shape.hidden(),
            1.0,
            false,
        )?;
        backend.tanh(&mut shared.hidden, shape.len * shape.hidden_size)?;
        for block in &mut self.blocks {
            if let PrefixBlock::Projection {
                weight,
                bias,
                key_value,
                gradient,
            } = block
            {
                let (weight, bias) = (weight.master(), Some(bias.master()));
                let (room, hidden) = (&mut self.room, &shared.hidden);
                backend.linear(room, hidden, weight, bias, shape.output(), 1.0, false)?;
                backend.cast(key_value, room, shape.len * shape.width)?;
                backend.clear(gradient, shape.len * shape.width)?;
            }
        }
        Ok(())
    }

    /// The projection, to be taken backward; `None` for a prefix without one.
    pub fn projection_mut(&mut self) -> Option<ProjectionBackward<'_, B>> {
        Some(ProjectionBackward {
            shape: self.shape,
            shared: self.shared.as_mut()?,
            blocks: &mut self.blocks,
        })
    }
}

/// The backward pass of a projection: block by block, then the layer that all blocks share. Each
/// stage passes the blocks of all stages, so that the sum is taken in the same order everywhere.
pub struct ProjectionBackward<'a, B: Backend> {
    shape: PrefixShape,
    shared: &'a mut SharedProjection<B>,
    blocks: &'a mut [PrefixBlock<B>],
}

impl<B: Backend> ProjectionBackward<'_, B> {
    /// Values of the hidden layer's gradient, P H.
    pub fn hidden_len(&self) -> usize {
        self.shape.len * self.shape.hidden_size
    }

    /// Starts with a gradient of zero in the hidden layer.
    ///
    /// # Errors
    /// When the device fails.
    pub fn begin(&mut self, backend: &B) -> Result<(), BackendError> {
        let len = self.hidden_len();
        backend.clear(&mut self.shared.dhidden, len)
    }

    /// Gradient of the rows of `trans.2` that block `own` of this stage holds, and the block's part
    /// of the hidden layer's gradient, `[P, H]`: zeros for a block of another stage (`None`).
    ///
    /// # Errors
    /// When the device fails.
    pub fn block_backward(
        &mut self,
        backend: &B,
        own: Option<usize>,
    ) -> Result<&mut B::Buffer<f32>, BackendError> {
        let (output, len) = (self.shape.output(), self.hidden_len());
        let SharedProjection { hidden, part, .. } = &mut *self.shared;
        match own.map(|index| &mut self.blocks[index]) {
            Some(PrefixBlock::Projection {
                weight,
                bias,
                gradient,
                ..
            }) => {
                backend.weight_gradient(weight.accumulate(), gradient, hidden, output, 1.0)?;
                backend.bias_gradient(bias.accumulate(), gradient, output)?;
                backend.linear_backward(part, gradient, weight.master(), output, 1.0, false)?;
            }
            Some(PrefixBlock::Embedding(_)) | None => backend.clear(part, len)?,
        }
        Ok(part)
    }

    /// Adds the part of a block, summed over all stages.
    ///
    /// # Errors
    /// When the device fails.
    pub fn add_part(&mut self, backend: &B) -> Result<(), BackendError> {
        let len = self.hidden_len();
        backend.add(&mut self.shared.dhidden, &self.shared.part, len)
    }

    /// Gradient of the shared layer, once all parts are added.
    ///
    /// # Errors
    /// When the device fails.
    pub fn shared_backward(self, backend: &B) -> Result<(), BackendError> {
        let (shape, len) = (self.shape.hidden(), self.hidden_len());
        let SharedProjection {
            embedding,
            weight,
            bias,
            hidden,
            dhidden,
            ..
        } = self.shared;
        backend.tanh_backward(dhidden, hidden, len)?;
        backend.weight_gradient(weight.accumulate(), dhidden, embedding.master(), shape, 1.0)?;
        backend.bias_gradient(bias.accumulate(), dhidden, shape)?;
        let dembedding = embedding.accumulate();
        backend.linear_backward(dembedding, dhidden, weight.master(), shape, 1.0, true)
    }
}
