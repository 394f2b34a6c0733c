//! Low-rank products of LoRA: launchers of kernels/adapter.cu.
//!
//! One side of the product, `low`, has at most [`MAX_RANK`] features, the other, `wide`, any number.
//! Where both are that few, the smaller one is `low`.

use super::device::{Argument, Geometry, Kernel, Pointer};
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::LinearShape;

/// Kernels of the family. An array holds those for ranks up to [`RANKS`] where rows of the wide side
/// are aligned, then the one for any shape.
pub(super) struct Kernels {
    /// `out = x weightᵀ` with weight `[low, wide]`, and with weight `[wide, low]`.
    down: [[Kernel; 5]; 2],
    /// `out = x weightᵀ` with weight `[wide, low]`, and with weight `[low, wide]`.
    up: [[Kernel; 5]; 2],
    gradient: [Kernel; 5],
}

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
