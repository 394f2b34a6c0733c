//! Tensors that are made up when they are read: a model of any size without a file, for benchmarks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use half::f16;

use super::{CheckpointError, Dtype, HostTensor, OpenTensor, TensorInfo, TensorSource};
use crate::random::{Domain, Key};

/// Standard deviation of matrices, as models of this kind are initialised with.
const SPREAD: f32 = 0.02;

/// Distinct random values; larger tensors repeat them. What is measured with them does not look at
/// values, and a billion of fresh ones take longer than the benchmark.
const DISTINCT: usize = 1 << 16;

/// A source of random f16 tensors: matrices normal, norm weights one, biases zero.
pub struct SyntheticTensors {
    shapes: BTreeMap<String, Vec<usize>>,
    values: Vec<f16>,
}

impl SyntheticTensors {
    /// Tensors of these names and shapes, from a seed.
    pub fn new(shapes: impl IntoIterator<Item = (String, Vec<usize>)>, seed: u64) -> Self {
        let mut stream = Key::new(seed, Domain::ModelInit).stream();
        SyntheticTensors {
            shapes: shapes.into_iter().collect(),
            values: (0..DISTINCT)
                .map(|_| f16::from_f32(SPREAD * stream.normal()))
                .collect(),
        }
    }
}

impl TensorSource for SyntheticTensors {
    fn names(&self) -> Vec<String> {
        self.shapes.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(TensorInfo {
            dtype: Dtype::F16,
            shape: self.shapes.get(name)?.clone(),
            file: PathBuf::from("synthetic"),
        })
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        let tensor = self.open(name)?;
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        HostTensor::new(dtype, shape, tensor.into_bytes()?)
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        let Some(shape) = self.shapes.get(name) else {
            return Err(CheckpointError::NoSuchTensor {
                path: PathBuf::from("synthetic"),
                tensor: name.to_owned(),
            });
        };
        let values: &[f16] = match shape.len() {
            1 if name.ends_with(".weight") => &[f16::ONE],
            1 => &[f16::ZERO],
            _ => &self.values,
        };
        OpenTensor::repeating(Dtype::F16, shape.clone(), bytemuck::cast_slice(values))
    }
}
