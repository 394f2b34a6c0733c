//! Tensors in host memory and the conversions between their element types.

use std::fmt;

use half::f16;

use super::{CheckpointError, pieces};

#[cfg(target_endian = "big")]
compile_error!("tensor files are little-endian and are used here as they are");

/// The element type of a [`HostTensor`], by the names safetensors uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE binary32.
    F32,
    /// IEEE binary64.
    F64,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 16-bit integer.
    I16,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// One byte, 0 or 1.
    Bool,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::Bool => 1,
            Self::F16 | Self::Bf16 | Self::I16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// Whether the elements are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }

    /// Bytes of a tensor of this type and `shape`, or `None` when that does not fit a `usize`.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        element_count(shape)?.checked_mul(self.size())
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::F32 => "F32",
            Self::F64 => "F64",
            Self::I8 => "I8",
            Self::U8 => "U8",
            Self::I16 => "I16",
            Self::I32 => "I32",
            Self::I64 => "I64",
            Self::Bool => "BOOL",
        })
    }
}

/// A zero anywhere makes the tensor empty, however large the other extents are said to be.
fn element_count(shape: &[usize]) -> Option<usize> {
    if shape.contains(&0) {
        return Some(0);
    }
    shape.iter().try_fold(1_usize, |n, &d| n.checked_mul(d))
}

/// A tensor in host memory: contiguous rows, little-endian bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Element type of `bytes`.
    pub dtype: Dtype,
    /// Extent of each dimension, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements, contiguous, little-endian.
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// A tensor of raw little-endian elements.
    ///
    /// # Errors
    /// `bytes` is not what `dtype` and `shape` need.
    pub fn new(
        dtype: Dtype,
        shape: impl Into<Vec<usize>>,
        bytes: Vec<u8>,
    ) -> Result<Self, CheckpointError> {
        let tensor = Self {
            dtype,
            shape: shape.into(),
            bytes,
        };
        tensor.check()?;
        Ok(tensor)
    }

    /// An F32 tensor of `values`, row by row.
    ///
    /// # Errors
    /// `values` has not exactly the elements of `shape`.
    pub fn from_f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Result<Self, CheckpointError> {
        Self::new(Dtype::F32, shape, bytemuck::cast_slice(values).to_vec())
    }

    /// An F16 tensor of `values`, row by row.
    ///
    /// # Errors
    /// `values` has not exactly the elements of `shape`.
    pub fn from_f16(shape: impl Into<Vec<usize>>, values: &[f16]) -> Result<Self, CheckpointError> {
        Self::new(Dtype::F16, shape, bytemuck::cast_slice(values).to_vec())
    }

    /// An I64 tensor of `values`, row by row.
    ///
    /// # Errors
    /// `values` has not exactly the elements of `shape`.
    pub fn from_i64(shape: impl Into<Vec<usize>>, values: &[i64]) -> Result<Self, CheckpointError> {
        Self::new(Dtype::I64, shape, bytemuck::cast_slice(values).to_vec())
    }

    /// The number of elements.
    ///
    /// # Errors
    /// Shape and bytes disagree, which only a tensor built field by field can do.
    pub fn element_count(&self) -> Result<usize, CheckpointError> {
        self.check()?;
        Ok(self.bytes.len() / self.dtype.size())
    }

    /// Whether shape, element type and bytes agree.
    ///
    /// # Errors
    /// They do not.
    pub fn check(&self) -> Result<(), CheckpointError> {
        if self.dtype.bytes_of(&self.shape) == Some(self.bytes.len()) {
            return Ok(());
        }
        Err(CheckpointError::Shape {
            dtype: self.dtype,
            shape: self.shape.clone(),
            bytes: self.bytes.len(),
        })
    }

    /// The elements of a floating-point tensor as `f32`; only F64 is rounded.
    ///
    /// # Errors
    /// The elements are no floating-point numbers, or shape and bytes disagree.
    pub fn to_f32(&self) -> Result<Vec<f32>, CheckpointError> {
        self.check()?;
        let mut values = vec![0.0; self.bytes.len() / self.dtype.size()];
        pieces::to_f32(&mut values, self.dtype, &self.bytes)?;
        Ok(values)
    }

    /// The elements of a floating-point tensor as `f16`, rounded to nearest even once.
    ///
    /// # Errors
    /// The elements are no floating-point numbers, or shape and bytes disagree.
    pub fn to_f16(&self) -> Result<Vec<f16>, CheckpointError> {
        self.check()?;
        let mut values = vec![f16::ZERO; self.bytes.len() / self.dtype.size()];
        pieces::to_f16(&mut values, self.dtype, &self.bytes)?;
        Ok(values)
    }

    /// The elements of an integer or boolean tensor as `i64`.
    ///
    /// # Errors
    /// The elements are floating-point numbers, or shape and bytes disagree.
    pub fn to_i64(&self) -> Result<Vec<i64>, CheckpointError> {
        self.check()?;
        Ok(match self.dtype {
            Dtype::I64 => self.map(i64::from_le_bytes),
            Dtype::I32 => self.map(|b| i32::from_le_bytes(b).into()),
            Dtype::I16 => self.map(|b| i16::from_le_bytes(b).into()),
            Dtype::I8 => self.map(|b| i8::from_le_bytes(b).into()),
            Dtype::U8 | Dtype::Bool => self.map(|[b]| b.into()),
            found => {
                return Err(CheckpointError::Elements {
                    found,
                    wanted: "integers",
                });
            }
        })
    }

    /// Element by element; the callers choose `N` to be the size of `dtype`.
    fn map<const N: usize, T>(&self, convert: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (elements, _) = self.bytes.as_chunks::<N>();
        elements.iter().map(|&element| convert(element)).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn values_survive_the_way_there_and_back() {
        let values = [0.0_f32, -1.5, f32::MAX, 3.0e-8];
        let tensor = HostTensor::from_f32([2, 2], &values).unwrap();
        assert_eq!(tensor.to_f32().unwrap(), values);
        assert_eq!(tensor.element_count().unwrap(), 4);
        let ids = [i64::MIN, 0, 130_528];
        let tensor = HostTensor::from_i64([3], &ids).unwrap();
        assert_eq!(tensor.to_i64().unwrap(), ids);
    }

    #[test]
    fn narrow_types_widen_exactly() {
        let half = HostTensor::from_f16([2], &[f16::from_f32(0.1), f16::MIN]).unwrap();
        assert_eq!(half.to_f32().unwrap(), [0.099975586, -65504.0]);
        let brain = HostTensor::new(Dtype::Bf16, [1], vec![0x80, 0x3f]).unwrap();
        assert_eq!(brain.to_f32().unwrap(), [1.0]);
        let double = HostTensor::new(Dtype::F64, [1], 0.1_f64.to_le_bytes().to_vec()).unwrap();
        assert_eq!(double.to_f32().unwrap(), [0.1]);
        assert_eq!(double.to_f16().unwrap(), [f16::from_f64(0.1)]);
        let signed = HostTensor::new(Dtype::I8, [2], vec![0xff, 0x7f]).unwrap();
        assert_eq!(signed.to_i64().unwrap(), [-1, 127]);
    }

    #[test]
    fn wrong_types_and_sizes_are_refused() {
        let ids = HostTensor::from_i64([1], &[7]).unwrap();
        assert!(ids.to_f32().unwrap_err().to_string().contains("I64"));
        let real = HostTensor::from_f32([1], &[7.0]).unwrap();
        assert!(real.to_i64().unwrap_err().to_string().contains("F32"));
        assert!(HostTensor::from_f32([3], &[1.0]).is_err());
        let huge = [usize::MAX, 2];
        assert!(HostTensor::from_f32(huge, &[]).is_err());
        assert!(HostTensor::from_f32([usize::MAX, 2, 0], &[]).is_ok());
    }
}
