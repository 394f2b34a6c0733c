//! The last norm, lm_head and the loss, on the rows that need them, a chunk of rows at a time.

use super::batch::Batch;
use super::norm::Norm;
use crate::backend::{Backend, BackendError, LinearShape, Sums};

/// Logits held at once: 16 Mi of them (128 rows of ChatGLM-6B's vocabulary), but at least 16 rows.
const CHUNK_LOGITS: usize = 1 << 24;
const CHUNK_ROWS: std::ops::RangeInclusive<usize> = 16..=512;

/// Which rows of a micro-batch the head computes logits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitsRows {
    /// Every token.
    All,
    /// Tokens with a target.
    Targets,
    /// The last token of each sequence.
    Last,
}

/// Final norm and loss around lm_head, whose matrix the stage holds; on the last stage.
pub struct Head<B: Backend> {
    /// `final_layernorm`.
    pub norm: Norm<B>,
    /// V.
    pub vocab_size: usize,
    room: Room<B>,
}

/// Room for one chunk of C rows.
struct Room<B: Backend> {
    rows: usize,
    /// Row indices that are no targets, `[T]`.
    index: B::Buffer<u32>,
    /// Picked rows of the last block's output, `[C, H]`.
    x: B::Buffer<f32>,
    /// `[2, C]`.
    stats: B::Buffer<f32>,
    /// Normed, and its gradient, `[C, H]`.
    norm: B::Buffer<B::Element>,
    dnorm: B::Buffer<B::Element>,
    /// Gradient of `x`, `[C, H]`.
    dx: B::Buffer<B::Element>,
    /// Logits, then their gradient, `[C, V]`.
    logits: B::Buffer<B::Element>,
}

/// Rows of a chunk of logits.
pub fn chunk_rows(vocab_size: usize, rows: usize) -> usize {
    let fitting = CHUNK_LOGITS / vocab_size;
    fitting
        .clamp(*CHUNK_ROWS.start(), *CHUNK_ROWS.end())
        .min(rows)
}

/// The matrix of lm_head, and where its gradient is added up where it is trained.
pub struct HeadMatrix<'a, B: Backend> {
    /// `[V, H]`.
    pub values: &'a B::Buffer<B::Element>,
    /// `[V, H]`.
    pub gradient: Option<&'a mut B::Buffer<f32>>,
}

impl<B: Backend> Head<B> {
    /// A head with room for micro-batches of `rows` tokens.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(
        backend: &B,
        norm: Norm<B>,
        vocab_size: usize,
        rows: usize,
    ) -> Result<Self, BackendError> {
        let chunk = chunk_rows(vocab_size, rows);
        let hidden = norm.hidden_size;
        Ok(Head {
            norm,
            vocab_size,
            room: Room {
                rows: chunk,
                index: backend.zeros(rows)?,
                x: backend.zeros(chunk * hidden)?,
                stats: backend.zeros(2 * chunk)?,
                norm: backend.zeros(chunk * hidden)?,
                dnorm: backend.zeros(chunk * hidden)?,
                dx: backend.zeros(chunk * hidden)?,
                logits: backend.zeros(chunk * vocab_size)?,
            },
        })
    }

    fn shape(&self, rows: usize) -> LinearShape {
        LinearShape {
            rows,
            in_features: self.norm.hidden_size,
            out_features: self.vocab_size,
            // Gradients of logits are small and many: a sum of V of them in f16 loses most.
            sums: Sums::F32,
        }
    }

    /// Logits on the chosen rows of `x [T, H]`, in host memory, row after row; and the normed rows.
    ///
    /// # Errors
    /// When the device fails.
    pub fn logits(
        &mut self,
        backend: &B,
        matrix: &B::Buffer<B::Element>,
        x: &B::Buffer<f32>,
        batch: &Batch<B>,
        rows: LogitsRows,
    ) -> Result<Logits<B>, BackendError> {
        let index: Vec<u32> = match rows {
            LogitsRows::All => (0..batch.rows as u32).collect(),
            LogitsRows::Targets => backend.read(&batch.target_rows, batch.targets)?,
            LogitsRows::Last => {
                let spans = batch.spans.iter();
                spans
                    .map(|span| (span.q_start + span.q_len - 1) as u32)
                    .collect()
            }
        };
        backend.write(&mut self.room.index, &index)?;
        let hidden = self.norm.hidden_size;
        let mut all = Logits {
            logits: Vec::with_capacity(index.len() * self.vocab_size),
            normed: Vec::with_capacity(index.len() * hidden),
        };
        for first in (0..index.len()).step_by(self.room.rows) {
            let rows = self.room.rows.min(index.len() - first);
            let shape = self.shape(rows);
            let room = &mut self.room;
            backend.gather_rows(&mut room.x, x, &room.index, first, rows, hidden)?;
            self.norm
                .forward(backend, &mut room.norm, &mut room.stats, &room.x, rows)?;
            backend.linear(
                &mut room.logits,
                &room.norm,
                matrix,
                None,
                shape,
                1.0,
                false,
            )?;
            all.logits
                .extend(backend.read(&room.logits, rows * self.vocab_size)?);
            all.normed.extend(backend.read(&room.norm, rows * hidden)?);
        }
        Ok(all)
    }

    /// Loss of every target of the micro-batch into `token_loss [R]`, and `scale` times the gradient
    /// of their sum into `dx [T, H]`.
    ///
    /// The head's backward runs inside its forward: a chunk's logits exist only then, and computing
    /// them again would cost as much as two and a half blocks.
    ///
    /// # Errors
    /// When the device fails.
    #[allow(clippy::too_many_arguments)]
    pub fn loss(
        &mut self,
        backend: &B,
        mut matrix: HeadMatrix<'_, B>,
        token_loss: &mut B::Buffer<f32>,
        dx: &mut B::Buffer<B::Element>,
        x: &B::Buffer<f32>,
        batch: &Batch<B>,
        scale: f32,
    ) -> Result<(), BackendError> {
        let hidden = self.norm.hidden_size;
        backend.clear(dx, batch.rows * hidden)?;
        for first in (0..batch.targets).step_by(self.room.rows) {
            let rows = self.room.rows.min(batch.targets - first);
            let shape = self.shape(rows);
            let room = &mut self.room;
            let index = &batch.target_rows;
            backend.gather_rows(&mut room.x, x, index, first, rows, hidden)?;
            self.norm
                .forward(backend, &mut room.norm, &mut room.stats, &room.x, rows)?;
            let logits = &mut room.logits;
            backend.linear(logits, &room.norm, matrix.values, None, shape, 1.0, false)?;
            let ids = &batch.target_ids;
            backend.cross_entropy(token_loss, logits, ids, first, rows, self.vocab_size, scale)?;
            if let Some(gradient) = matrix.gradient.as_deref_mut() {
                backend.weight_gradient(gradient, logits, &room.norm, shape, 1.0)?;
            }
            backend.linear_backward(&mut room.dnorm, logits, matrix.values, shape, 1.0, false)?;
            let dnorm = &room.dnorm;
            let dx_rows = Some(&mut room.dx);
            self.norm
                .backward(backend, dx_rows, dnorm, None, &room.x, &room.stats, rows)?;
            backend.scatter_rows(dx, &room.dx, index, first, rows, hidden)?;
        }
        Ok(())
    }
}

/// What [`Head::logits`] computed, in host memory.
pub struct Logits<B: Backend> {
    /// `[rows, V]`.
    pub logits: Vec<B::Element>,
    /// The final norm's output, `[rows, H]`.
    pub normed: Vec<B::Element>,
}
