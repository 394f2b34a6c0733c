//! Made-up weights: launchers of kernels/synthetic.cu.

use super::device::Kernel;
use super::elementwise::flat;
use super::memory::CudaBuffer;
use super::module::Modules;
use super::{Cuda, Result};
use crate::backend::Element;
use crate::quant::Bits;
use crate::random::{Key, NEAR_NORMAL_DEVIATION};

/// Kernels of the family.
pub(super) struct Kernels {
    synthetic_f16: Kernel,
    synthetic_f32: Kernel,
    synthetic_int8: Kernel,
    synthetic_int4: Kernel,
}

impl Kernels {
    pub fn load(modules: &Modules) -> Result<Self> {
        let kernel = |name| modules.kernel("synthetic.cu", name);
        Ok(Kernels {
            synthetic_f16: kernel("synthetic_f16")?,
            synthetic_f32: kernel("synthetic_f32")?,
            synthetic_int8: kernel("synthetic_int8")?,
            synthetic_int4: kernel("synthetic_int4")?,
        })
    }
}

/// Values, or bytes of codes, that a thread makes at a time.
const WIDTH: usize = 8;

pub(super) fn weights<T: Element>(
    cuda: &Cuda,
    out: &mut CudaBuffer<T>,
    len: usize,
    key: Key,
    deviation: f32,
) -> Result<()> {
    debug_assert!(len <= out.len());
    // The two storage types differ in size.
    let kernel = match T::SIZE {
        2 => &cuda.synthetic.synthetic_f16,
        _ => &cuda.synthetic.synthetic_f32,
    };
    let [low, high] = key.to_words();
    // Divided here, so that it has the bits of the CPU backend's.
    let factor = deviation / NEAR_NORMAL_DEVIATION;
    flat(cuda, kernel, WIDTH, len, &[out, &low, &high, &factor])
}

pub(super) fn codes(
    cuda: &Cuda,
    out: &mut CudaBuffer<i8>,
    len: usize,
    key: Key,
    bits: Bits,
) -> Result<()> {
    debug_assert!(len <= out.len());
    let kernel = match bits {
        Bits::Eight => &cuda.synthetic.synthetic_int8,
        Bits::Four => &cuda.synthetic.synthetic_int4,
    };
    let [low, high] = key.to_words();
    flat(cuda, kernel, WIDTH, len, &[out, &low, &high])
}
