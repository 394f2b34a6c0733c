//! Linear layers: large products by cuBLASLt, low-rank ones by kernels/adapter.cu.

use super::adapter;
use super::blas::{BUCKET, Kind, Product, Types};
use super::device::{Geometry, Kernel, Pointer};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, LinearWork, Result};
use crate::backend::{Element, LinearShape};

/// Kernels of kernels/linear.cu.
pub(super) struct Kernels {
    bias_gradient_f16: Kernel,
    bias_gradient_f32: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        Ok(Kernels {
            bias_gradient_f16: modules.kernel("linear.cu", "bias_gradient_f16")?,
            bias_gradient_f32: modules.kernel("linear.cu", "bias_gradient_f32")?,
        })
    }
}

/// The two storage types differ in size, which decides everything here.
fn is_half<T: Element>() -> bool {
    T::SIZE == 2
}

/// Whether a product is narrow enough for the kernels of LoRA.
fn is_low_rank<T: Element>(shape: LinearShape) -> bool {
    is_half::<T>() && shape.in_features.min(shape.out_features) <= adapter::MAX_RANK
}

fn empty(shape: LinearShape) -> bool {
    shape.rows == 0 || shape.in_features == 0 || shape.out_features == 0
}

#[allow(clippy::too_many_arguments)]
pub(super) fn linear<T: Element>(
    cuda: &Cuda,
    out: &mut CudaBuffer<T>,
    x: &CudaBuffer<T>,
    weight: &CudaBuffer<T>,
    bias: Option<&CudaBuffer<T>>,
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    if empty(shape) {
        return Ok(());
    }
    if bias.is_none() && is_low_rank::<T>(shape) {
        let operands = (out.at(), x.at(), weight.at());
        return adapter::forward(cuda, operands, shape, scale, accumulate);
    }
    cuda.blas.multiply(&Product {
        kind: Kind::Forward {
            bias: bias.is_some(),
        },
        types: if is_half::<T>() {
            Types::F16
        } else {
            Types::F32
        },
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale,
        accumulate,
        out: out.at(),
        left: weight.at(),
        right: x.at(),
        bias: bias.map_or(Pointer::NULL, CudaBuffer::at),
    })
}

pub(super) fn linear_backward<T: Element>(
    cuda: &Cuda,
    dx: &mut CudaBuffer<T>,
    dout: &CudaBuffer<T>,
    weight: &CudaBuffer<T>,
    shape: LinearShape,
    scale: f32,
    accumulate: bool,
) -> Result<()> {
    if empty(shape) {
        return Ok(());
    }
    if is_low_rank::<T>(shape) {
        let operands = (dx.at(), dout.at(), weight.at());
        return adapter::backward(cuda, operands, shape, scale, accumulate);
    }
    cuda.blas.multiply(&Product {
        kind: Kind::Backward,
        types: if is_half::<T>() {
            Types::F16
        } else {
            Types::F32
        },
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale,
        accumulate,
        out: dx.at(),
        left: weight.at(),
        right: dout.at(),
        bias: Pointer::NULL,
    })
}

pub(super) fn weight_gradient<T: Element>(
    cuda: &Cuda,
    dweight: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<T>,
    x: &CudaBuffer<T>,
    shape: LinearShape,
    scale: f32,
) -> Result<()> {
    if empty(shape) {
        return Ok(());
    }
    if is_low_rank::<T>(shape) {
        let operands = (dweight.at(), dout.at(), x.at());
        return adapter::weight_gradient(cuda, operands, shape, scale);
    }
    cuda.blas.multiply(&Product {
        kind: Kind::WeightGradient,
        types: match is_half::<T>() {
            true => Types::F16IntoF32,
            false => Types::F32,
        },
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale,
        accumulate: true,
        out: dweight.at(),
        left: x.at(),
        right: dout.at(),
        bias: Pointer::NULL,
    })
}

pub(super) fn bias_gradient<T: Element>(
    cuda: &Cuda,
    dbias: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<T>,
    shape: LinearShape,
) -> Result<()> {
    let kernel = match is_half::<T>() {
        true => &cuda.linear.bias_gradient_f16,
        false => &cuda.linear.bias_gradient_f32,
    };
    let (rows, cols) = (shape.rows as u32, shape.out_features as u32);
    let geometry = Geometry::line(cols.div_ceil(128), 128);
    cuda.device
        .launch(kernel, geometry, &[dbias, dout, &rows, &cols])
}

/// Runs the products of a layer once for each bucket of rows, over memory that holds nothing yet.
pub(super) fn prepare(cuda: &Cuda, layer: &LinearWork, at: Pointer, bytes: usize) -> Result<()> {
    let (i, o) = (layer.in_features, layer.out_features);
    let (types, gradient) = match layer.single {
        true => (Types::F32, Types::F32),
        false => (Types::F16, Types::F16IntoF32),
    };
    let mut kinds = vec![(Kind::Forward { bias: layer.bias }, types, false)];
    if layer.backward {
        kinds.push((Kind::Backward, types, false));
    }
    if layer.backward && layer.single {
        // Into the gradient of the prefix's embedding.
        kinds.push((Kind::Backward, types, true));
    }
    if layer.weight_gradient {
        kinds.push((Kind::WeightGradient, gradient, true));
    }
    for bucket in 1..=layer.max_rows.div_ceil(BUCKET) {
        let rows = (bucket * BUCKET).min(layer.max_rows);
        if 4 * (i * o).max(rows * i).max(rows * o) > bytes {
            break;
        }
        for &(kind, types, accumulate) in &kinds {
            cuda.blas.multiply(&Product {
                kind,
                types,
                rows,
                in_features: i,
                out_features: o,
                scale: 0.0,
                accumulate,
                out: at,
                left: at,
                right: at,
                bias: at,
            })?;
        }
    }
    Ok(())
}
