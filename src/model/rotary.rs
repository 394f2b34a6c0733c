//! Tables of the rotary embedding.

use half::f16;

use super::batch::Batch;
use crate::backend::{Backend, BackendError, RotaryPositions};
use crate::config::architecture::{Architecture, RotaryKind};
pub use crate::config::run::RotaryPrecision;

/// Cosines and sines by position, `[positions, W / 2]` each, with W elements that turn with one position.
#[derive(Clone, Debug, PartialEq)]
pub struct RotaryTable {
    /// Cosines.
    pub cos: Vec<f32>,
    /// Sines.
    pub sin: Vec<f32>,
}

/// `base^(-2 k / W)` for `k < W / 2`. ChatGLM-6B's are rounded to f16 and widened: the original does so
/// even when the model runs in f32.
pub fn inverse_frequencies(kind: RotaryKind, width: usize) -> Vec<f32> {
    (0..width / 2)
        .map(|k| {
            let exponent = (2 * k) as f32 / width as f32;
            match kind {
                RotaryKind::TwoDimensional => f16::from_f32(1.0 / 10000f32.powf(exponent)).to_f32(),
                RotaryKind::Interleaved { base, .. } => 1.0 / (base as f32).powf(exponent),
            }
        })
        .collect()
}

impl RotaryTable {
    /// The tables for positions `0 .. positions` of heads of `head_dim`.
    ///
    /// With [`RotaryPrecision::Original`] they are rounded to f16: in ChatGLM-6B the angles too; in later
    /// generations the finished tables alone, as ChatGLM3 and GLM-4 do. (ChatGLM2's code works in f16
    /// throughout, where positions above 2,048 are no longer told apart; its weights do not ask for that.)
    pub fn new(
        architecture: &Architecture,
        head_dim: usize,
        positions: usize,
        precision: RotaryPrecision,
    ) -> Self {
        let kind = architecture.rotary;
        let frequencies = inverse_frequencies(kind, architecture.rotary_width(head_dim));
        let rounded = |x: f32| match precision {
            RotaryPrecision::F32 => x,
            RotaryPrecision::Original => f16::from_f32(x).to_f32(),
        };
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in 0..positions {
            for &frequency in &frequencies {
                let angle = match kind {
                    RotaryKind::TwoDimensional => rounded(position as f32 * frequency),
                    RotaryKind::Interleaved {
                        position_divisor, ..
                    } => (position as f64 / position_divisor) as f32 * frequency,
                };
                cos.push(rounded(angle.cos()));
                sin.push(rounded(angle.sin()));
            }
        }
        RotaryTable { cos, sin }
    }
}

/// The tables on a device.
pub struct Rotary<B: Backend> {
    /// `[positions, W / 2]`.
    pub cos: B::Buffer<f32>,
    /// `[positions, W / 2]`.
    pub sin: B::Buffer<f32>,
    kind: RotaryKind,
}

impl<B: Backend> Rotary<B> {
    /// Computes and uploads the tables.
    ///
    /// # Errors
    /// When the device has no memory for them.
    pub fn new(
        backend: &B,
        architecture: &Architecture,
        head_dim: usize,
        positions: usize,
        precision: RotaryPrecision,
    ) -> Result<Self, BackendError> {
        let table = RotaryTable::new(architecture, head_dim, positions, precision);
        Ok(Rotary {
            cos: backend.upload(&table.cos)?,
            sin: backend.upload(&table.sin)?,
            kind: architecture.rotary,
        })
    }

    /// Which tables' rows the tokens of a micro-batch take, and which elements of a head they turn.
    pub fn positions<'a>(&self, batch: &'a Batch<B>) -> RotaryPositions<'a, B> {
        let position = &batch.position;
        match self.kind {
            RotaryKind::TwoDimensional => RotaryPositions::TwoDimensional {
                position,
                block_position: &batch.block_position,
            },
            RotaryKind::Interleaved { width, .. } => {
                RotaryPositions::Interleaved { position, width }
            }
        }
    }
}
