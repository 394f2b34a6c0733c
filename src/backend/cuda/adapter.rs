//! Low-rank products of LoRA: launchers of kernels/adapter.cu.
//!
//! One side of the product, `low`, has at most [`MAX_RANK`] features, the other, `wide`, any number.
//! Where both are that few, the smaller one is `low`.

use super::device::{Argument, Geometry, Kernel, Pointer};
use super::module::Modules;
use super::{Cuda, OpRooms, Result};
use crate::backend::LinearShape;

/// Kernels of the family. An array holds those for ranks up to [`RANKS`] where rows of the wide side
/// are aligned, then the one for any shape.
pub(super) struct Kernels {
    /// `out = x weightᵀ` with weight `[low, wide]`, and with weight `[wide, low]`.
    down: [[Kernel; 5]; 2],
    /// `out = x weightᵀ` with weight `[wide, low]`, and with weight `[low, wide]`.
    up: [[Kernel; 5]; 2],
    gradient: [Kernel; 5],
    /// Both gradients in one pass, for ranks 8 and 16.
    backward: [Kernel; 2],
    add_parts: Kernel,
}

/// Ranks that `backward` is made for.
const BACKWARD_RANKS: [usize; 2] = [8, 16];

/// `PART_COLUMNS` and `PART_ROWS` of kernels/adapter.cu.
const PART_COLUMNS: usize = 512;
const PART_ROWS: usize = 256;

/// Ranks that kernels are made for.
const RANKS: [usize; 4] = [8, 16, 32, 64];

/// Largest rank that the kernels take.
pub(super) const MAX_RANK: usize = 64;

/// `ADAPTER_THREADS` of kernels/adapter.cu.
const THREADS: u32 = 256;

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        macro_rules! family {
            ($name:literal) => {
                ranks(
                    modules,
                    [
                        concat!($name, "_8"),
                        concat!($name, "_16"),
                        concat!($name, "_32"),
                        concat!($name, "_64"),
                        concat!($name, "_any"),
                    ],
                )?
            };
        }
        Ok(Kernels {
            down: [
                family!("low_rank_down"),
                family!("low_rank_down_transposed"),
            ],
            up: [family!("low_rank_up"), family!("low_rank_up_transposed")],
            gradient: family!("low_rank_gradient"),
            backward: [
                modules.kernel("adapter.cu", "low_rank_backward_8")?,
                modules.kernel("adapter.cu", "low_rank_backward_16")?,
            ],
            add_parts: modules.kernel("adapter.cu", "add_low_rank_parts")?,
        })
    }
}

fn ranks(modules: &Modules, [a, b, c, d, any]: [&'static str; 5]) -> Result<[Kernel; 5]> {
    let kernel = |name| modules.kernel("adapter.cu", name);
    Ok([kernel(a)?, kernel(b)?, kernel(c)?, kernel(d)?, kernel(any)?])
}

/// The kernel of an array that fits: rows of `wide` halves must start at multiples of 16 bytes, rows of
/// `low` halves at multiples of 4, where 16 or 4 bytes are to be loaded at once.
fn choose(kernels: &[Kernel; 5], wide: usize, low: usize) -> Kernel {
    let aligned = wide.is_multiple_of(8) && low.is_multiple_of(2);
    let index = RANKS.iter().position(|&rank| aligned && low <= rank);
    kernels[index.unwrap_or(RANKS.len())]
}

/// `out [T, O] = scale * x [T, I] weight [O, I]ᵀ`, added to `out` when `accumulate`; `operands` are out,
/// x and weight.
pub(super) fn forward(
    cuda: &Cuda,
    operands: (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    let sizes = [shape.rows, shape.in_features, shape.out_features];
    product(cuda, operands, sizes, false, scale, accumulate)
}

/// `dx [T, I] = scale * dout [T, O] weight [O, I]`, added to `dx` when `accumulate`; `operands` are dx,
/// dout and weight.
pub(super) fn backward(
    cuda: &Cuda,
    operands: (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    let sizes = [shape.rows, shape.out_features, shape.in_features];
    product(cuda, operands, sizes, true, scale, accumulate)
}

/// `out [rows, outer] = scale * x [rows, inner] weight`, with weight `[outer, inner]`, or
/// `[inner, outer]` when `transposed`.
fn product(
    cuda: &Cuda,
    (out, x, weight): (Pointer, Pointer, Pointer),
    [rows, inner, outer]: [usize; 3],
    transposed: bool,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    let Kernels { down, up, .. } = &cuda.adapter;
    let kernels = |pair: &[[Kernel; 5]; 2]| pair[usize::from(transposed)];
    let (is_down, rows) = (outer <= inner, rows as u32);
    let (wide, low) = match is_down {
        true => (inner, outer),
        false => (outer, inner),
    };
    let kernel = choose(&kernels(if is_down { down } else { up }), wide, low);
    // A warp of `up` loads its weights once per block: the more of them, the more rows it serves.
    let block_rows: u32 = if low <= 16 { 64 } else { 128 };
    let geometry = match is_down {
        true => Geometry::line(rows.div_ceil(16), THREADS),
        false => Geometry {
            grid: [(wide as u32).div_ceil(256), rows.div_ceil(block_rows), 1],
            threads: THREADS,
            shared: 0,
        },
    };
    let (wide, low, accumulate) = (wide as u32, low as u32, u32::from(accumulate));
    let arguments: [&dyn Argument; 9] = [
        &out,
        &x,
        &weight,
        &rows,
        &wide,
        &low,
        &scale,
        &accumulate,
        &block_rows,
    ];
    // `down` has no blocks of rows to be told of.
    let count = arguments.len() - usize::from(is_down);
    cuda.device.launch(&kernel, geometry, &arguments[..count])
}

/// `dweight [O, I] += scale * doutᵀ x`, f32; `operands` are dweight, dout and x.
pub(super) fn weight_gradient(
    cuda: &Cuda,
    (dweight, dout, x): (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
) -> Result<()> {
    let low_major = shape.out_features <= shape.in_features;
    let (x_wide, x_low, wide, low) = match low_major {
        true => (x, dout, shape.in_features, shape.out_features),
        false => (dout, x, shape.out_features, shape.in_features),
    };
    cuda.device.launch(
        &choose(&cuda.adapter.gradient, wide, low),
        Geometry::line((wide as u32).div_ceil(32), THREADS),
        &[
            &dweight,
            &x_wide,
            &x_low,
            &(shape.rows as u32),
            &(wide as u32),
            &(low as u32),
            &scale,
            &u32::from(low_major),
        ],
    )
}

/// Values of the parts of dlow and of dweight.
fn part_lens(rows: usize, wide: usize, low: usize) -> [usize; 2] {
    [
        wide.div_ceil(PART_COLUMNS) * rows * low,
        rows.div_ceil(PART_ROWS) * wide * low,
    ]
}

/// Bytes of scratch for the largest micro-batch.
pub(super) fn scratch_bytes(rooms: &OpRooms) -> usize {
    let (rank, widest) = (rooms.lora_rank, rooms.lora_widest);
    if !BACKWARD_RANKS.contains(&rank) {
        return 0;
    }
    let lens = part_lens(rooms.rows, widest, rank);
    lens.iter().sum::<usize>() * size_of::<f32>()
}

/// `dlow [T, I] = scale * dout [T, O] weight [O, I]` and `dweight += scale * doutᵀ low`, dout read once;
/// `operands` are dout, low and weight. `false` where no kernel is made for the shape, and nothing was
/// queued.
pub(super) fn low_rank_backward(
    cuda: &Cuda,
    (dlow, dweight): (Pointer, Pointer),
    (dout, low, weight): (Pointer, Pointer, Pointer),
    shape: LinearShape,
    scale: f32,
) -> Result<bool> {
    let (rank, wide) = (shape.in_features, shape.out_features);
    let made = BACKWARD_RANKS.iter().position(|&made| made == rank);
    let Some(index) = made.filter(|_| wide.is_multiple_of(8)) else {
        return Ok(false);
    };
    let [of_dlow, of_dweight] = part_lens(shape.rows, wide, rank);
    let dlow_parts = cuda.scratch((of_dlow + of_dweight) * size_of::<f32>())?;
    let dweight_parts = dlow_parts.offset(of_dlow * size_of::<f32>());
    let column_chunks = wide.div_ceil(PART_COLUMNS) as u32;
    let row_chunks = shape.rows.div_ceil(PART_ROWS) as u32;
    let values = (shape.rows + wide) * rank;
    let (rows, wide, rank) = (shape.rows as u32, wide as u32, rank as u32);
    let geometry = Geometry {
        grid: [column_chunks, row_chunks, 1],
        ..Geometry::line(0, THREADS)
    };
    cuda.device.launch(
        &cuda.adapter.backward[index],
        geometry,
        &[
            &dlow_parts,
            &dweight_parts,
            &dout,
            &low,
            &weight,
            &rows,
            &wide,
        ],
    )?;
    cuda.device.launch(
        &cuda.adapter.add_parts,
        Geometry::line(values.div_ceil(THREADS as usize) as u32, THREADS),
        &[
            &dlow,
            &dweight,
            &dlow_parts,
            &dweight_parts,
            &rows,
            &wide,
            &rank,
            &column_chunks,
            &row_chunks,
            &scale,
        ],
    )?;
    Ok(true)
}
