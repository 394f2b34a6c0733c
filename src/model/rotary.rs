//! Tables of the two-dimensional rotary embedding.

use half::f16;

use crate::backend::{Backend, BackendError};
pub use crate::config::run::RotaryPrecision;

/// Cosines and sines by position, `[positions, D / 4]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// `f16(1 / 10000^(2 k / (D / 2)))` for `k < D / 4`, widened: the original rounds the inverse
/// frequencies to f16 even when the model runs in f32.
pub fn inverse_frequencies(head_dim: usize) -> Vec<f32> {
    let dim = head_dim / 2;
    (0..dim / 2)
        .map(|k| {
            let exponent = (2 * k) as f32 / dim as f32;
            f16::from_f32(1.0 / 10000f32.powf(exponent)).to_f32()
        })
        .collect()
}

impl RotaryTable {
    /// The tables for positions `0 .. positions`.
    pub fn new(head_dim: usize, positions: usize, precision: RotaryPrecision) -> Self {
        let frequencies = inverse_frequencies(head_dim);
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in 0..positions {
            for &frequency in &frequencies {
                let angle = position as f32 * frequency;
                let (c, s) = match precision {
                    RotaryPrecision::F32 => (angle.cos(), angle.sin()),
                    RotaryPrecision::Original => {
                        let angle = f16::from_f32(angle).to_f32();
                        (
                            f16::from_f32(angle.cos()).to_f32(),
                            f16::from_f32(angle.sin()).to_f32(),
                        )
                    }
                };
                cos.push(c);
                sin.push(s);
            }
        }
        RotaryTable { cos, sin }
    }
}

/// The tables on a device.
pub struct Rotary<B: Backend> {
    /// `[positions, D / 4]`.
    pub cos: B::Buffer<f32>,
    /// `[positions, D / 4]`.
    pub sin: B::Buffer<f32>,
    /// Positions that the tables cover.
    pub positions: usize,
}

impl<B: Backend> Rotary<B> {
    /// Computes and uploads the tables.
    ///
    /// # Errors
    /// When the device has no memory for them.
    pub fn new(
        backend: &B,
        head_dim: usize,
        positions: usize,
        precision: RotaryPrecision,
    ) -> Result<Self, BackendError> {
        let table = RotaryTable::new(head_dim, positions, precision);
        Ok(Rotary {
            cos: backend.upload(&table.cos)?,
            sin: backend.upload(&table.sin)?,
            positions,
        })
    }
}
