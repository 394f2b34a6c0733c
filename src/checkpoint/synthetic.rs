//! Tensors that are made up and not read: a model of any size without a file, for benchmarks.

use std::collections::BTreeMap;
use std::path::PathBuf;

use half::f16;

use super::{CheckpointError, Dtype, HostTensor, TensorInfo, TensorSource};
use crate::random::{Domain, Key, NEAR_NORMAL_DEVIATION, near_normal};

/// Standard deviation of matrices, as models of this kind are initialised with.
const DEVIATION: f32 = 0.02;

/// What the values of a tensor are, for a device that makes them itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Synthetic {
    /// All the same.
    Constant(f32),
    /// As `Backend::synthetic` makes them.
    Random {
        /// Of this tensor alone.
        key: Key,
        /// Standard deviation.
        deviation: f32,
    },
}

/// A source of random f16 tensors: matrices nearly normal, norm weights one, biases zero.
///
/// Values depend on the seed and on a tensor's place among the names of the whole model, not on who
/// loads it.
pub struct SyntheticTensors {
    tensors: BTreeMap<String, (Vec<usize>, Synthetic)>,
}

impl SyntheticTensors {
    /// Tensors of these names and shapes, from a seed.
    pub fn new(shapes: impl IntoIterator<Item = (String, Vec<usize>)>, seed: u64) -> Self {
        let sorted: BTreeMap<String, Vec<usize>> = shapes.into_iter().collect();
        let model = Key::new(seed, Domain::ModelInit);
        let tensor = |(index, (name, shape)): (u64, (String, Vec<usize>))| {
            let values = match shape.len() {
                1 if name.ends_with(".weight") => Synthetic::Constant(1.0),
                1 => Synthetic::Constant(0.0),
                _ => Synthetic::Random {
                    key: model.fold(index),
                    deviation: DEVIATION,
                },
            };
            (name, (shape, values))
        };
        SyntheticTensors {
            tensors: (0..).zip(sorted).map(tensor).collect(),
        }
    }
}

impl TensorSource for SyntheticTensors {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (shape, _) = self.tensors.get(name)?;
        Some(TensorInfo {
            dtype: Dtype::F16,
            shape: shape.clone(),
            file: PathBuf::from("synthetic"),
        })
    }

    /// The values that a device makes of [`TensorSource::synthetic`], made here.
    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        let Some((shape, values)) = self.tensors.get(name) else {
            return Err(CheckpointError::NoSuchTensor {
                path: PathBuf::from("synthetic"),
                tensor: name.to_owned(),
            });
        };
        let mut made = vec![f16::ZERO; shape.iter().product()];
        match *values {
            Synthetic::Constant(value) => made.fill(f16::from_f32(value)),
            Synthetic::Random { key, deviation } => {
                let factor = deviation / NEAR_NORMAL_DEVIATION;
                let value = |word| f16::from_f32(near_normal(word) as f32 * factor);
                key.fill(0, &mut made, value);
            }
        }
        HostTensor::new(
            Dtype::F16,
            shape.clone(),
            bytemuck::cast_slice(&made).to_vec(),
        )
    }

    fn synthetic(&self, name: &str) -> Option<Synthetic> {
        self.tensors.get(name).map(|(_, values)| *values)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn matrices_differ_and_spread_as_they_should() {
        let shapes = [
            ("a", vec![97, 65]),
            ("b", vec![97, 65]),
            ("norm.weight", vec![3]),
            ("norm.bias", vec![3]),
        ];
        let shapes = shapes.map(|(name, shape)| (name.to_owned(), shape));
        let source = SyntheticTensors::new(shapes.clone(), 7);
        // The order in which they are named does not matter.
        let again = SyntheticTensors::new(shapes.into_iter().rev(), 7);
        let values = |name: &str| {
            let read = source.read(name).unwrap();
            assert_eq!(read.bytes, again.read(name).unwrap().bytes);
            let mut values = vec![0.0; read.shape.iter().product()];
            source.open(name).unwrap().read_f32(0, &mut values).unwrap();
            values
        };
        assert_eq!(
            (values("norm.weight"), values("norm.bias")),
            (vec![1.0; 3], vec![0.0; 3])
        );
        assert_ne!(values("a"), values("b"));
        let squares: f32 = values("a").iter().map(|value| value * value).sum();
        let deviation = (squares / (97.0 * 65.0)).sqrt();
        assert!((deviation / DEVIATION - 1.0).abs() < 0.03, "{deviation}");
        assert!(source.read("c").is_err() && source.synthetic("c").is_none());
    }
}
