//! Sums and AdamW: launchers of kernels/optim.cu.
//!
//! Where an op works on many tensors, a table of them and a list of (tensor, piece) lie on the device,
//! one block taking one piece. The tensors of a run stay where they are, so the tables are sent once.

use std::cell::RefCell;

use bytemuck::{Pod, Zeroable};

use super::device::{Geometry, Kernel, Pointer};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, OpRooms, Result};
use crate::backend::{AdamwStep, AdamwTensor, SumOf};

/// `PIECE` and `OPTIM_THREADS` of kernels/optim.cu.
const PIECE: usize = 8192;
const THREADS: u32 = 256;

/// Kernels of the family, and their tables.
pub(super) struct Kernels {
    sum: Kernel,
    sum_pieces: Kernel,
    square_pieces: Kernel,
    square_sums: Kernel,
    adamw: Kernel,
    square_terms: Table<SquaresTerm>,
    adamw_tensors: Table<TensorRow>,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("optim.cu", name);
        Ok(Kernels {
            sum: kernel("sum")?,
            sum_pieces: kernel("sum_pieces")?,
            square_pieces: kernel("square_pieces")?,
            square_sums: kernel("square_sums")?,
            adamw: kernel("adamw")?,
            square_terms: Table::new(),
            adamw_tensors: Table::new(),
        })
    }
}

/// `SquaresTerm` of kernels/optim.cu.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Pod, Zeroable)]
struct SquaresTerm {
    x: u64,
    len: u64,
    index: u32,
    first_piece: u32,
}

/// `AdamwTensor` of kernels/optim.cu.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Pod, Zeroable)]
struct TensorRow {
    working: u64,
    master: u64,
    exp_avg: u64,
    exp_avg_sq: u64,
    gradient: u64,
    len: u64,
    weight_decay: f32,
    unused: u32,
}

/// A table of tensors on the device with the list of their pieces, and the rows it was made from.
struct Table<R> {
    held: RefCell<Option<Held<R>>>,
}

struct Held<R> {
    rows: Vec<R>,
    pieces: u32,
    /// The rows, then `Piece` of kernels/optim.cu for each block.
    device: CudaBuffer<u32>,
}

/// Where a table lies.
struct OnDevice {
    rows: Pointer,
    pieces: Pointer,
    piece_count: u32,
}

impl<R: Pod + PartialEq> Table<R> {
    fn new() -> Self {
        Table {
            held: RefCell::new(None),
        }
    }

    /// Words of a table of tensors with so many values each.
    fn words(lens: &[usize]) -> usize {
        lens.len() * size_of::<R>() / 4 + 2 * pieces(lens)
    }

    /// Room for `words` words, so that no table up to there is a new allocation.
    fn reserve(&self, cuda: &Cuda, words: usize) -> Result<()> {
        *self.held.borrow_mut() = Some(Held {
            rows: Vec::new(),
            pieces: 0,
            device: cuda.memory.buffer(words)?,
        });
        Ok(())
    }

    /// The table of `rows`, sent unless it is the one sent last; `len` tells a row's values. Good until
    /// the next call on the same object.
    fn get(&self, cuda: &Cuda, rows: Vec<R>, len: impl Fn(&R) -> u64) -> Result<OnDevice> {
        let row_words = rows.len() * size_of::<R>() / 4;
        let mut held = self.held.borrow_mut();
        let current = match held.take() {
            Some(current) if current.rows == rows => current,
            former => {
                let mut words: Vec<u32> = bytemuck::cast_slice(&rows).to_vec();
                for (tensor, row) in rows.iter().enumerate() {
                    for piece in 0..len(row).div_ceil(PIECE as u64) {
                        words.extend([tensor as u32, piece as u32]);
                    }
                }
                let device = match former {
                    Some(former) if former.device.len() >= words.len() => former.device,
                    _ => cuda.memory.buffer(words.len())?,
                };
                cuda.staging
                    .write(device.at(), bytemuck::cast_slice(&words))?;
                Held {
                    rows,
                    pieces: ((words.len() - row_words) / 2) as u32,
                    device,
                }
            }
        };
        let table = OnDevice {
            rows: current.device.at(),
            pieces: current.device.at_index(row_words),
            piece_count: current.pieces,
        };
        *held = Some(current);
        Ok(table)
    }
}

/// Pieces of tensors with so many values each.
fn pieces(lens: &[usize]) -> usize {
    lens.iter().map(|len| len.div_ceil(PIECE)).sum()
}

/// Bytes of scratch for the sums of a run; what [`sum`] takes is for the largest micro-batch.
pub(super) fn scratch_bytes(rooms: &OpRooms) -> usize {
    pieces(&rooms.summed).max(rooms.rows.div_ceil(PIECE)) * size_of::<f32>()
}

/// Words of the tables of a run: of the tensors whose squares are summed, and of those updated.
pub(super) fn table_words(rooms: &OpRooms) -> [usize; 2] {
    [
        Table::<SquaresTerm>::words(&rooms.summed),
        Table::<TensorRow>::words(&rooms.updated),
    ]
}

/// Takes the room of [`table_words`].
pub(super) fn reserve(cuda: &Cuda, rooms: &OpRooms) -> Result<()> {
    let [squares, tensors] = table_words(rooms);
    cuda.optim.square_terms.reserve(cuda, squares)?;
    cuda.optim.adamw_tensors.reserve(cuda, tensors)
}

pub(super) fn sum(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    index: usize,
    x: &CudaBuffer<f32>,
    len: usize,
) -> Result<()> {
    debug_assert!(index < out.len() && len <= x.len());
    let (kernels, index) = (&cuda.optim, index as u32);
    let pieces = len.div_ceil(PIECE);
    let (x, len) = match pieces {
        0 | 1 => (x.at(), len),
        _ => {
            let partials = cuda.scratch(pieces * size_of::<f32>())?;
            let geometry = Geometry::line(pieces as u32, THREADS);
            cuda.device.launch(
                &kernels.sum_pieces,
                geometry,
                &[&partials, x, &(len as u64)],
            )?;
            (partials, pieces)
        }
    };
    cuda.device.launch(
        &kernels.sum,
        Geometry::line(1, THREADS),
        &[out, &x, &(len as u64), &index],
    )
}

pub(super) fn sum_squares(
    cuda: &Cuda,
    out: &mut CudaBuffer<f32>,
    terms: &[SumOf<'_, Cuda>],
    scale: f32,
) -> Result<()> {
    let mut first_piece = 0;
    let row = |term: &SumOf<'_, Cuda>| {
        debug_assert!(term.index < out.len() && term.len <= term.x.len());
        let row = SquaresTerm {
            x: term.x.at().0,
            len: term.len as u64,
            index: term.index as u32,
            first_piece,
        };
        first_piece += term.len.div_ceil(PIECE) as u32;
        row
    };
    let rows: Vec<SquaresTerm> = terms.iter().map(row).collect();
    let kernels = &cuda.optim;
    let table = kernels.square_terms.get(cuda, rows, |row| row.len)?;
    let partials = cuda.scratch(table.piece_count as usize * size_of::<f32>())?;
    cuda.device.launch(
        &kernels.square_pieces,
        Geometry::line(table.piece_count, THREADS),
        &[&partials, &table.rows, &table.pieces],
    )?;
    cuda.device.launch(
        &kernels.square_sums,
        Geometry::line(terms.len() as u32, THREADS),
        &[out, &partials, &table.rows, &scale],
    )
}

pub(super) fn adamw(
    cuda: &Cuda,
    tensors: &mut [AdamwTensor<'_, Cuda>],
    step: AdamwStep,
) -> Result<()> {
    let row = |tensor: &AdamwTensor<'_, Cuda>| TensorRow {
        working: tensor.working.at().0,
        master: tensor.master.at().0,
        exp_avg: tensor.exp_avg.at().0,
        exp_avg_sq: tensor.exp_avg_sq.at().0,
        gradient: tensor.gradient.at().0,
        len: tensor.len as u64,
        weight_decay: tensor.weight_decay,
        unused: 0,
    };
    let rows: Vec<TensorRow> = tensors.iter().map(row).collect();
    let kernels = &cuda.optim;
    let table = kernels.adamw_tensors.get(cuda, rows, |row| row.len)?;
    cuda.device.launch(
        &kernels.adamw,
        Geometry::line(table.piece_count, THREADS),
        &[
            &table.rows,
            &table.pieces,
            &step.learning_rate,
            &step.beta1,
            &step.beta2,
            &step.eps,
            &step.bias_correction1,
            &step.bias_correction2,
            &step.gradient_scale,
        ],
    )
}
