//! Linear layers: large products by cuBLASLt, low-rank ones by kernels/adapter.cu.

use super::blas::BUCKET;
use super::device::{Geometry, Kernel, Pointer};
use super::memory::CudaBuffer;
use super::module::Modules;
use super::prepare::GeluAt;
use super::product::{Kind, Product, Types};
use super::{Cuda, LinearWork, Result, adapter, elementwise};
use crate::backend::{Element, LinearShape, Sums};
use half::f16;

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

/// Types of a product with a weight.
fn types<T: Element>(sums: Sums) -> Types {
    match (is_half::<T>(), sums) {
        (true, Sums::F16) => Types::F16Sums,
        (true, Sums::F32) => Types::F16,
        (false, _) => Types::F32,
    }
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
            gelu: false,
        },
        types: types::<T>(shape.sums),
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale,
        accumulate,
        out: out.at(),
        left: weight.at(),
        right: x.at(),
        bias: bias.map_or(Pointer::NULL, CudaBuffer::at),
        pre: Pointer::NULL,
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
        kind: Kind::Backward { gelu: false },
        types: types::<T>(shape.sums),
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale,
        accumulate,
        out: dx.at(),
        left: weight.at(),
        right: dout.at(),
        bias: Pointer::NULL,
        pre: Pointer::NULL,
    })
}

/// GELU in the epilogue of the product, or behind it where cuBLASLt has no algorithm for that.
pub(super) fn linear_gelu(
    cuda: &Cuda,
    out: &mut CudaBuffer<f16>,
    pre: &mut CudaBuffer<f16>,
    x: &CudaBuffer<f16>,
    weight: &CudaBuffer<f16>,
    bias: Option<&CudaBuffer<f16>>,
    shape: LinearShape,
) -> Result<()> {
    if empty(shape) {
        return Ok(());
    }
    let in_one = cuda.blas.multiply_with_gelu(&Product {
        kind: Kind::Forward {
            bias: bias.is_some(),
            gelu: true,
        },
        types: types::<f16>(shape.sums),
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale: 1.0,
        accumulate: false,
        out: out.at(),
        left: weight.at(),
        right: x.at(),
        bias: bias.map_or(Pointer::NULL, CudaBuffer::at),
        pre: pre.at(),
    })?;
    if in_one {
        return Ok(());
    }
    linear(cuda, pre, x, weight, bias, shape, 1.0, false)?;
    elementwise::gelu(cuda, out, pre, shape.rows * shape.out_features)
}

/// As [`linear_gelu`].
pub(super) fn gelu_linear_backward(
    cuda: &Cuda,
    dpre: &mut CudaBuffer<f16>,
    dout: &CudaBuffer<f16>,
    weight: &CudaBuffer<f16>,
    pre: &CudaBuffer<f16>,
    shape: LinearShape,
) -> Result<()> {
    if empty(shape) {
        return Ok(());
    }
    let in_one = cuda.blas.multiply_with_gelu(&Product {
        kind: Kind::Backward { gelu: true },
        types: types::<f16>(shape.sums),
        rows: shape.rows,
        in_features: shape.in_features,
        out_features: shape.out_features,
        scale: 1.0,
        accumulate: false,
        out: dpre.at(),
        left: weight.at(),
        right: dout.at(),
        bias: Pointer::NULL,
        pre: pre.at(),
    })?;
    if in_one {
        return Ok(());
    }
    linear_backward(cuda, dpre, dout, weight, shape, 1.0, false)?;
    elementwise::gelu_backward(cuda, dpre, pre, shape.rows * shape.in_features)
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
        pre: Pointer::NULL,
    })
}

/// One pass over `dout` where there is a kernel for the shape, else two.
#[allow(clippy::too_many_arguments)]
pub(super) fn low_rank_backward(
    cuda: &Cuda,
    dlow: &mut CudaBuffer<f16>,
    dweight: &mut CudaBuffer<f32>,
    dout: &CudaBuffer<f16>,
    low: &CudaBuffer<f16>,
    weight: &CudaBuffer<f16>,
    shape: LinearShape,
    scale: f32,
) -> Result<()> {
    if empty(shape) {
        return Ok(());
    }
    let gradients = (dlow.at(), dweight.at());
    let operands = (dout.at(), low.at(), weight.at());
    if adapter::low_rank_backward(cuda, gradients, operands, shape, scale)? {
        return Ok(());
    }
    weight_gradient(cuda, dweight, dout, low, shape, scale)?;
    linear_backward(cuda, dlow, dout, weight, shape, scale, false)
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
        false => (types::<f16>(layer.sums), Types::F16IntoF32),
    };
    let forward = |gelu| Kind::Forward {
        bias: layer.bias,
        gelu,
    };
    let mut kinds = vec![(forward(false), types, false)];
    if layer.gelu == Some(GeluAt::Output) {
        kinds.push((forward(true), types, false));
    }
    if layer.backward {
        kinds.push((Kind::Backward { gelu: false }, types, false));
    }
    if layer.backward && layer.gelu == Some(GeluAt::Input) {
        kinds.push((Kind::Backward { gelu: true }, types, false));
    }
    if layer.lora {
        kinds.push((forward(false), types, true));
    }
    if layer.backward && (layer.single || layer.lora) {
        // Into the gradient of the prefix's embedding, or onto LoRA's share.
        kinds.push((Kind::Backward { gelu: false }, types, true));
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
            let product = Product {
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
                pre: at,
            };
            match kind.has_gelu() {
                // That there is none, and it will be taken in two, is not known before it is asked for.
                true => drop(cuda.blas.multiply_with_gelu(&product)?),
                false => cuda.blas.multiply(&product)?,
            }
        }
    }
    Ok(())
}
