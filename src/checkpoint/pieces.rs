//! Tensors taken piece by piece out of their file, so that a model is never in host memory as a whole.

use std::borrow::Cow;
use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::Mmap;

use super::{CheckpointError, Dtype, HostTensor, TensorSource};

/// Elements that are converted at a time; both forms stay in the innermost cache.
const BLOCK: usize = 1024;

/// Bytes that two tensors are compared by at a time.
const COMPARED: usize = 1 << 20;

/// A tensor of a source, opened to be read from any place on.
#[derive(Debug)]
pub struct OpenTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the whole tensor.
    len: usize,
    /// The tensor's bytes; where they are fewer, they come again and again.
    bytes: Cow<'a, [u8]>,
    _pages: Option<Pages<'a>>,
}

/// Pages of a mapped file, which the process gives up with the tensor that stands there: so that a model
/// that was loaded does not count as the program's memory. They stay in the system's cache of the file.
#[derive(Debug)]
struct Pages<'a> {
    map: &'a Mmap,
    range: Range<usize>,
}

#[cfg(unix)]
impl Drop for Pages<'_> {
    fn drop(&mut self) {
        let (start, len) = (self.range.start, self.range.len());
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: the map is of a file and never written to, so that pages given up are read from the
        // file again by whoever looks at them next.
        let advised = unsafe { self.map.unchecked_advise_range(advice, start, len) };
        // Without it, everything is the same but for the figure of the program's memory.
        let _ = advised;
    }
}

impl<'a> OpenTensor<'a> {
    /// A tensor whose bytes, contiguous and little-endian, lie in a mapped file or in memory.
    ///
    /// # Errors
    /// `bytes` is not what `dtype` and `shape` need.
    pub fn new(
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, CheckpointError> {
        let bytes = bytes.into();
        match dtype.bytes_of(&shape) {
            Some(len) if len == bytes.len() => Ok(OpenTensor {
                dtype,
                shape,
                len,
                bytes,
                _pages: None,
            }),
            _ => Err(CheckpointError::Shape {
                dtype,
                shape,
                bytes: bytes.len(),
            }),
        }
    }

    /// A tensor that is `range` of a mapped file.
    ///
    /// # Errors
    /// `range` is not of the length that `dtype` and `shape` need.
    pub(super) fn mapped(
        dtype: Dtype,
        shape: Vec<usize>,
        map: &'a Mmap,
        range: Range<usize>,
    ) -> Result<Self, CheckpointError> {
        Ok(OpenTensor {
            _pages: Some(Pages {
                map,
                range: range.clone(),
            }),
            ..OpenTensor::new(dtype, shape, &map[range])?
        })
    }

    /// A tensor whose bytes are `pattern` again and again.
    ///
    /// # Errors
    /// `pattern` is empty where the tensor is not, or the shape is beyond any memory.
    pub fn repeating(
        dtype: Dtype,
        shape: Vec<usize>,
        pattern: &'a [u8],
    ) -> Result<Self, CheckpointError> {
        match dtype.bytes_of(&shape) {
            Some(len) if len == 0 || !pattern.is_empty() => Ok(OpenTensor {
                dtype,
                shape,
                len,
                bytes: Cow::Borrowed(&pattern[..pattern.len().min(len)]),
                _pages: None,
            }),
            _ => Err(CheckpointError::Shape {
                dtype,
                shape,
                bytes: pattern.len(),
            }),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Extent of each dimension, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn element_count(&self) -> usize {
        self.len / self.dtype.size()
    }

    /// The whole tensor in memory.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        match self.bytes.len() == self.len {
            true => self.bytes.into_owned(),
            false => self.bytes.iter().copied().cycle().take(self.len).collect(),
        }
    }

    fn range(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>, CheckpointError> {
        if range.end > self.len {
            return Err(CheckpointError::Shape {
                dtype: self.dtype,
                shape: self.shape.clone(),
                bytes: range.end,
            });
        }
        Ok(match self.bytes.get(range.clone()) {
            Some(bytes) => Cow::Borrowed(bytes),
            None => {
                let from = self.bytes.iter().copied().cycle();
                let skipped = range.start % self.bytes.len();
                Cow::Owned(from.skip(skipped).take(range.len()).collect())
            }
        })
    }

    fn elements(&self, start: usize, count: usize) -> Result<Cow<'_, [u8]>, CheckpointError> {
        let size = self.dtype.size();
        self.range(start * size..(start + count) * size)
    }

    /// The elements from `start` on as `f32`; only F64 is rounded.
    ///
    /// # Errors
    /// There are not so many, or they are no floating-point numbers.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        to_f32(out, self.dtype, &self.elements(start, out.len())?)
    }

    /// The elements from `start` on as `f16`, rounded to nearest even once.
    ///
    /// # Errors
    /// There are not so many, or they are no floating-point numbers.
    pub fn read_f16(&self, start: usize, out: &mut [f16]) -> Result<(), CheckpointError> {
        to_f16(out, self.dtype, &self.elements(start, out.len())?)
    }

    /// The I8 elements from `start` on.
    ///
    /// # Errors
    /// There are not so many, or they are of another type.
    pub fn read_i8(&self, start: usize, out: &mut [i8]) -> Result<(), CheckpointError> {
        if self.dtype != Dtype::I8 {
            return Err(CheckpointError::Elements {
                found: self.dtype,
                wanted: "I8 codes",
            });
        }
        let elements = self.elements(start, out.len())?;
        bytemuck::cast_slice_mut(out).copy_from_slice(&elements);
        Ok(())
    }
}

impl TryFrom<HostTensor> for OpenTensor<'_> {
    type Error = CheckpointError;

    fn try_from(tensor: HostTensor) -> Result<Self, CheckpointError> {
        let HostTensor {
            dtype,
            shape,
            bytes,
        } = tensor;
        OpenTensor::new(dtype, shape, bytes)
    }
}

/// Whether two tensors of a source are the same: type, shape and every byte. Neither is taken into
/// memory as a whole where its file is mapped.
///
/// # Errors
/// One of them cannot be read.
pub fn same_tensor(
    source: &dyn TensorSource,
    one: &str,
    other: &str,
) -> Result<bool, CheckpointError> {
    let (one, other) = (source.open(one)?, source.open(other)?);
    if (one.dtype, &one.shape) != (other.dtype, &other.shape) {
        return Ok(false);
    }
    for start in (0..one.len).step_by(COMPARED) {
        let range = start..(start + COMPARED).min(one.len);
        if one.range(range.clone())? != other.range(range)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Elements of a floating-point type as f32; `bytes` are those of `out.len()` of them.
pub(super) fn to_f32(out: &mut [f32], dtype: Dtype, bytes: &[u8]) -> Result<(), CheckpointError> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        Dtype::F16 => blocks::<f16, _>(out, bytes, |halves, out| halves.convert_to_f32_slice(out)),
        Dtype::Bf16 => {
            blocks::<bf16, _>(out, bytes, |brains, out| brains.convert_to_f32_slice(out))
        }
        Dtype::F64 => each(out, bytes, |bytes| f64::from_le_bytes(bytes) as f32),
        _ => return Err(not_floating(dtype)),
    }
    Ok(())
}

/// The same as f16, rounded once.
pub(super) fn to_f16(out: &mut [f16], dtype: Dtype, bytes: &[u8]) -> Result<(), CheckpointError> {
    match dtype {
        Dtype::F16 => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        Dtype::F32 => blocks::<f32, _>(out, bytes, |wide, out| out.convert_from_f32_slice(wide)),
        Dtype::Bf16 => {
            let mut wide = [0.0; BLOCK];
            blocks::<bf16, _>(out, bytes, |brains, out| {
                let wide = &mut wide[..brains.len()];
                brains.convert_to_f32_slice(wide);
                out.convert_from_f32_slice(wide);
            });
        }
        Dtype::F64 => each(out, bytes, |bytes| f16::from_f64(f64::from_le_bytes(bytes))),
        _ => return Err(not_floating(dtype)),
    }
    Ok(())
}

fn not_floating(found: Dtype) -> CheckpointError {
    CheckpointError::Elements {
        found,
        wanted: "floating-point numbers",
    }
}

/// Block by block, each brought to an address that `T` can stand at: in a file it may be any.
fn blocks<T: bytemuck::Pod, U>(
    out: &mut [U],
    bytes: &[u8],
    mut convert: impl FnMut(&[T], &mut [U]),
) {
    let mut room = [T::zeroed(); BLOCK];
    let bytes = bytes.chunks(BLOCK * size_of::<T>());
    for (out, bytes) in out.chunks_mut(BLOCK).zip(bytes) {
        let room = &mut room[..out.len()];
        bytemuck::cast_slice_mut(room).copy_from_slice(bytes);
        convert(room, out);
    }
}

fn each<const N: usize, U>(out: &mut [U], bytes: &[u8], convert: impl Fn([u8; N]) -> U) {
    let (elements, _) = bytes.as_chunks::<N>();
    for (out, &element) in out.iter_mut().zip(elements) {
        *out = convert(element);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Enough for several blocks and a rest.
    const COUNT: usize = 2 * BLOCK + 77;

    fn values() -> Vec<f32> {
        let value = |i: usize| ((i * 2_654_435_761) % 60_000) as f32 * 1.7e-3 - 51.0;
        (0..COUNT).map(value).collect()
    }

    fn tensors() -> Vec<HostTensor> {
        let bytes = |dtype, bytes| HostTensor::new(dtype, [COUNT], bytes).unwrap();
        let halves: Vec<f16> = values().into_iter().map(f16::from_f32).collect();
        let brains = values()
            .into_iter()
            .flat_map(|x| bf16::from_f32(x).to_le_bytes());
        let doubles = values()
            .into_iter()
            .flat_map(|x| (f64::from(x) + 1e-9).to_le_bytes());
        vec![
            HostTensor::from_f32([COUNT], &values()).unwrap(),
            HostTensor::from_f16([COUNT], &halves).unwrap(),
            bytes(Dtype::Bf16, brains.collect()),
            bytes(Dtype::F64, doubles.collect()),
        ]
    }

    /// One element after another, each by itself.
    fn one_by_one(tensor: &HostTensor) -> Vec<f64> {
        let elements = tensor.bytes.chunks(tensor.dtype.size());
        let element = |bytes: &[u8]| match tensor.dtype {
            Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()).into(),
            Dtype::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).into(),
            Dtype::Bf16 => bf16::from_le_bytes(bytes.try_into().unwrap()).into(),
            _ => f64::from_le_bytes(bytes.try_into().unwrap()),
        };
        elements.map(element).collect()
    }

    #[test]
    fn pieces_from_anywhere_are_those_of_the_whole() {
        for tensor in tensors() {
            let expected = one_by_one(&tensor);
            // One byte in front, so that no element stands where its type wants it.
            let mut shifted = vec![0];
            shifted.extend(&tensor.bytes);
            let open = OpenTensor::new(tensor.dtype, vec![COUNT], &shifted[1..]).unwrap();
            assert_eq!(open.element_count(), COUNT);
            for (start, count) in [(0, COUNT), (1, BLOCK), (BLOCK - 3, BLOCK + 7), (COUNT, 0)] {
                let mut wide = vec![f32::NAN; count];
                open.read_f32(start, &mut wide).unwrap();
                let mut halves = vec![f16::NAN; count];
                open.read_f16(start, &mut halves).unwrap();
                for (i, &x) in expected[start..start + count].iter().enumerate() {
                    assert_eq!(wide[i], x as f32, "{:?}", tensor.dtype);
                    assert_eq!(halves[i], f16::from_f64(x), "{:?}", tensor.dtype);
                }
            }
            let mut beyond = [0.0; 2];
            assert!(open.read_f32(COUNT - 1, &mut beyond).is_err());
            assert!(open.read_i8(0, &mut [0]).is_err());
        }
    }

    #[test]
    fn a_pattern_goes_on_for_the_length_of_the_tensor() {
        let pattern = [1, 2, 3, 4, 5];
        let open = OpenTensor::repeating(Dtype::I8, vec![3, 4], &pattern).unwrap();
        let mut out = [0; 12];
        open.read_i8(0, &mut out).unwrap();
        assert_eq!(out, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]);
        let mut out = [0; 7];
        open.read_i8(4, &mut out).unwrap();
        assert_eq!(out, [5, 1, 2, 3, 4, 5, 1]);
        assert_eq!(open.into_bytes().len(), 12);
        assert!(OpenTensor::repeating(Dtype::I8, vec![2], &[]).is_err());
        let short = OpenTensor::repeating(Dtype::I8, vec![2], &pattern).unwrap();
        assert_eq!(short.into_bytes(), [1, 2]);
    }
}
