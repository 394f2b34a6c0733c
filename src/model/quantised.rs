//! The frozen linear layers of the blocks as int8 or int4 codes, and from codes to weights and back.
//!
//! Codes are made while the model is read, or read as they stand in a folder that THUDM's `quantize()`
//! has been through. Before a product they become weights again, in room that all layers of a stage
//! share; so results are those of a frozen base that holds these weights, bit for bit.

use std::path::Path;

use half::f16;

use super::ModelError;
use super::linear::Weight;
use super::names::{LinearSite, Names};
use crate::adapter::Parameter;
use crate::backend::{Backend, BackendError};
use crate::config::model::ModelConfig;
use crate::config::run::Quantization;
use crate::quant::Bits;

/// Width of the codes; `None` where weights are stored as everything else is.
pub fn bits(quantization: Quantization) -> Option<Bits> {
    match quantization {
        Quantization::None => None,
        Quantization::Int8 => Some(Bits::Eight),
        Quantization::Int4 => Some(Bits::Four),
    }
}

/// The word for it, in settings and messages.
pub(super) fn word(quantization: Quantization) -> &'static str {
    match quantization {
        Quantization::None => "none",
        Quantization::Int8 => "int8",
        Quantization::Int4 => "int4",
    }
}

/// How the base is held when `asked` meets a folder that holds `found`: a quantised folder stays as it
/// is, and a full one is quantised while it is read.
///
/// # Errors
/// Other codes are asked for than the folder has.
pub fn chosen(
    asked: Quantization,
    found: Quantization,
    folder: &Path,
) -> Result<Quantization, ModelError> {
    match (asked, found) {
        (asked, Quantization::None) => Ok(asked),
        (Quantization::None, found) => Ok(found),
        (asked, found) if asked == found => Ok(found),
        (asked, found) => Err(ModelError::OtherCodes {
            folder: folder.to_owned(),
            found: word(found),
            asked: word(asked),
        }),
    }
}

/// Room for the weights of the largest linear layer; 0 where none is quantised.
pub fn dequantised_len(config: &ModelConfig) -> usize {
    let len = |site: LinearSite| {
        let (in_features, out_features) = site.features(config);
        in_features * out_features
    };
    match config.quantization {
        Quantization::None => 0,
        _ => Names::of(config).linear_sites().map(len).max().unwrap_or(0),
    }
}

/// A frozen weight `[O, I]` as codes.
pub struct QuantisedWeight<B: Backend> {
    /// As [`Bits`] packs them, row after row.
    pub codes: B::Buffer<i8>,
    /// Of each row, `[O]`.
    pub scales: B::Buffer<f16>,
    /// Width of a code.
    pub bits: Bits,
    /// O.
    pub rows: usize,
    /// I.
    pub cols: usize,
}

/// The weight of a linear layer of a block.
pub enum Matrix<B: Backend> {
    /// In the storage type.
    Plain(Weight<B>),
    /// Frozen, as codes.
    Quantised(QuantisedWeight<B>),
}

impl<B: Backend> Matrix<B> {
    /// The values in the storage type; codes become values in `room`.
    ///
    /// # Errors
    /// When the device fails.
    pub fn values<'a>(
        &'a self,
        backend: &B,
        room: &'a mut B::Buffer<B::Element>,
    ) -> Result<&'a B::Buffer<B::Element>, BackendError> {
        match self {
            Matrix::Plain(weight) => Ok(weight.values()),
            Matrix::Quantised(weight) => {
                let QuantisedWeight {
                    codes,
                    scales,
                    bits,
                    rows,
                    cols,
                } = weight;
                backend.dequantise(room, codes, scales, *bits, *rows, *cols)?;
                Ok(room)
            }
        }
    }

    /// Whether it is trained.
    pub fn is_trained(&self) -> bool {
        matches!(self, Matrix::Plain(Weight::Trained(_)))
    }

    /// The parameter, where it is trained.
    pub fn parameter(&mut self) -> Option<&mut Parameter<B>> {
        match self {
            Matrix::Plain(weight) => weight.parameter(),
            Matrix::Quantised(_) => None,
        }
    }

    /// Where its gradient is added up, where it is trained.
    pub fn accumulate(&mut self) -> Option<&mut B::Buffer<f32>> {
        self.parameter().map(Parameter::accumulate)
    }
}
