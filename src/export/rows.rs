//! The rows of one weight as numbers: codes dequantised, a LoRA product added.

use std::collections::BTreeMap;
use std::path::Path;

use half::f16;

use super::ExportError;
use crate::adapter::files;
use crate::checkpoint::{CheckpointError, Dtype, HostTensor, LoraFiles, OpenTensor, TensorSource};
use crate::model::trainables::Trainables;
use crate::model::weights::scale_name;
use crate::quant::Bits;

/// The product that a LoRA adapter adds to one weight.
pub struct Delta {
    r: usize,
    /// `lora_alpha / r`.
    scale: f32,
    /// `[r, I]`.
    a: Vec<f32>,
    /// `[O, r]`.
    b: Vec<f32>,
}

/// Reads a LoRA adapter: what it adds, by the name of the weight.
///
/// # Errors
/// It cannot be read, or does not fit the model.
pub fn deltas(
    folder: &Path,
    trainables: &Trainables,
) -> Result<BTreeMap<String, Delta>, ExportError> {
    let read = LoraFiles::read(folder)?;
    // Names, shapes and finite values, against the model.
    files::take(folder, trainables.specs(), &read.tensors)?;
    let r = read.config.r;
    let scale = read.config.lora_alpha / r as f32;
    let delta = |(module, a, b): (&str, &HostTensor, &HostTensor)| {
        let (a, b) = (a.to_f32()?, b.to_f32()?);
        Ok((format!("{module}.weight"), Delta { r, scale, a, b }))
    };
    let deltas: Result<_, CheckpointError> = read.pairs().map(delta).collect();
    Ok(deltas?)
}

/// One weight of the model, read row by row. A tensor of one dimension is one row.
pub struct Rows<'a> {
    weight: OpenTensor<'a>,
    /// Codes: their width, and the scale of each row.
    codes: Option<(Bits, Vec<f16>)>,
    delta: Option<&'a Delta>,
    /// Number of rows.
    pub rows: usize,
    /// Values of a row.
    pub cols: usize,
    /// Room for the codes of a row.
    stored: Vec<i8>,
    /// Room for what is added to a row.
    added: Vec<f32>,
}

impl<'a> Rows<'a> {
    /// Opens the weight `name`, of which the model says the shape; `bits` are those of the folder.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn open(
        source: &'a dyn TensorSource,
        name: &str,
        shape: &[usize],
        bits: Option<Bits>,
        delta: Option<&'a Delta>,
    ) -> Result<Self, ExportError> {
        let (rows, cols) = match *shape {
            [rows, cols] => (rows, cols),
            _ => (1, shape.iter().product()),
        };
        let weight = source.open(name)?;
        let codes = match bits.filter(|_| weight.dtype() == Dtype::I8) {
            Some(bits) => {
                let mut scales = vec![f16::ZERO; rows];
                source.open(&scale_name(name))?.read_f16(0, &mut scales)?;
                Some((bits, scales))
            }
            None => None,
        };
        let room = |wanted: bool| if wanted { cols } else { 0 };
        Ok(Rows {
            rows,
            cols,
            stored: vec![0; room(codes.is_some())],
            added: vec![0.0; room(delta.is_some())],
            weight,
            codes,
            delta,
        })
    }

    /// Row `row` into `out`: `W + (alpha / r) B A`, in f32.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&mut self, row: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        match &self.codes {
            None => self.weight.read_f32(row * self.cols, out)?,
            Some((bits, scales)) => {
                let bytes = bits.row_bytes(self.cols);
                let stored = &mut self.stored[..bytes];
                self.weight.read_i8(row * bytes, stored)?;
                bits.dequantise_row(out, stored, scales[row]);
            }
        }
        let Some(delta) = self.delta else {
            return Ok(());
        };
        self.added.fill(0.0);
        let b = &delta.b[row * delta.r..][..delta.r];
        for (b, a) in b.iter().zip(delta.a.chunks_exact(self.cols)) {
            for (sum, a) in self.added.iter_mut().zip(a) {
                *sum += b * a;
            }
        }
        for (out, added) in out.iter_mut().zip(&self.added) {
            *out += delta.scale * added;
        }
        Ok(())
    }
}
