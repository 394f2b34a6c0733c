//! Tensors taken piece by piece out of their file, so that a model is never in host memory as a whole.

use std::borrow::Cow;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{CheckpointError, Dtype, HostTensor, TensorSource};

/// Elements that are converted at a time; both forms stay in the innermost cache.
const BLOCK: usize = 1024;

/// Elements that are taken out of a file at a time when they are not of the type asked for.
const PIECE: usize = 16 * BLOCK;

/// Bytes that two tensors are compared by at a time.
const COMPARED: usize = 1 << 20;

/// A tensor of a source, opened to be read from any place on.
#[derive(Debug)]
pub struct OpenTensor<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bytes of the whole tensor.
    len: usize,
    bytes: Bytes<'a>,
}

#[derive(Debug)]
enum Bytes<'a> {
    Memory(Cow<'a, [u8]>),
    File(Stretch<'a>),
}

/// A stretch of a file. It is read by position and not mapped: when somebody shortens a file that is
/// mapped, whoever looks at it is killed by a signal; here it is an error like any other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch<'a> {
    /// For messages.
    pub path: &'a Path,
    pub file: &'a File,
    /// Where it begins.
    pub start: u64,
}

impl Stretch<'_> {
    /// Bytes from `place` on.
    ///
    /// # Errors
    /// The file was shortened since it was opened, or the system refuses.
    pub fn read(&self, place: usize, out: &mut [u8]) -> Result<(), CheckpointError> {
        let at = self.start.saturating_add(place as u64);
        let read = self.file.read_exact_at(out, at);
        read.map_err(|cause| match cause.kind() {
            ErrorKind::UnexpectedEof => {
                CheckpointError::damaged(self.path, "it was shortened while it was being read")
            }
            _ => CheckpointError::read(self.path)(cause),
        })
    }

    /// CRC-32 of the next `len` bytes.
    ///
    /// # Errors
    /// As [`Stretch::read`].
    pub fn crc32(&self, len: usize) -> Result<u32, CheckpointError> {
        let mut hasher = crc32fast::Hasher::new();
        let mut room = vec![0; len.min(COMPARED)];
        for start in (0..len).step_by(COMPARED) {
            let room = &mut room[..(len - start).min(COMPARED)];
            self.read(start, room)?;
            hasher.update(room);
        }
        Ok(hasher.finalize())
    }
}

impl<'a> OpenTensor<'a> {
    /// A tensor whose bytes, contiguous and little-endian, lie in memory.
    ///
    /// # Errors
    /// `bytes` is not what `dtype` and `shape` need.
    pub fn new(
        dtype: Dtype,
        shape: Vec<usize>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, CheckpointError> {
        let bytes = bytes.into();
        let len = bytes.len();
        Self::of(dtype, shape, len, Bytes::Memory(bytes))
    }

    /// A tensor that is the next `len` bytes of a file.
    ///
    /// # Errors
    /// `len` is not what `dtype` and `shape` need.
    pub(super) fn in_file(
        dtype: Dtype,
        shape: Vec<usize>,
        len: usize,
        stretch: Stretch<'a>,
    ) -> Result<Self, CheckpointError> {
        Self::of(dtype, shape, len, Bytes::File(stretch))
    }

    fn of(
        dtype: Dtype,
        shape: Vec<usize>,
        len: usize,
        bytes: Bytes<'a>,
    ) -> Result<Self, CheckpointError> {
        if dtype.bytes_of(&shape) != Some(len) {
            return Err(CheckpointError::Shape {
                dtype,
                shape,
                bytes: len,
            });
        }
        Ok(OpenTensor {
            dtype,
            shape,
            len,
            bytes,
        })
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
    ///
    /// # Errors
    /// Its file cannot be read.
    pub(super) fn into_bytes(self) -> Result<Vec<u8>, CheckpointError> {
        match self.bytes {
            Bytes::Memory(bytes) => Ok(bytes.into_owned()),
            Bytes::File(_) => {
                let mut bytes = vec![0; self.len];
                self.fill(0, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Copies the bytes from `start` on, of which there must be so many.
    fn fill(&self, start: usize, out: &mut [u8]) -> Result<(), CheckpointError> {
        match &self.bytes {
            Bytes::File(stretch) => stretch.read(start, out)?,
            Bytes::Memory(bytes) => out.copy_from_slice(&bytes[start..start + out.len()]),
        }
        Ok(())
    }

    /// The bytes from `start` on: where they are in memory, or copied into `room`.
    fn bytes<'b>(
        &'b self,
        start: usize,
        len: usize,
        room: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], CheckpointError> {
        if let Bytes::Memory(bytes) = &self.bytes
            && let Some(bytes) = bytes.get(start..start + len)
        {
            return Ok(bytes);
        }
        room.resize(len, 0);
        self.fill(start, room)?;
        Ok(room)
    }

    /// Where `count` elements from `start` on begin, in bytes.
    fn place(&self, start: usize, count: usize) -> Result<usize, CheckpointError> {
        let size = self.dtype.size();
        let end = start
            .checked_add(count)
            .and_then(|end| end.checked_mul(size));
        if end.is_none_or(|end| end > self.len) {
            return Err(CheckpointError::Shape {
                dtype: self.dtype,
                shape: self.shape.clone(),
                bytes: end.unwrap_or(usize::MAX),
            });
        }
        Ok(start * size)
    }

    /// Converts the elements from `start` on, piece by piece.
    fn convert<T>(
        &self,
        start: usize,
        out: &mut [T],
        convert: impl Fn(&mut [T], Dtype, &[u8]) -> Result<(), CheckpointError>,
    ) -> Result<(), CheckpointError> {
        let size = self.dtype.size();
        let mut place = self.place(start, out.len())?;
        let mut room = Vec::new();
        for out in out.chunks_mut(PIECE) {
            let len = out.len() * size;
            convert(out, self.dtype, self.bytes(place, len, &mut room)?)?;
            place += len;
        }
        Ok(())
    }

    /// The elements from `start` on as `f32`; only F64 is rounded.
    ///
    /// # Errors
    /// There are not so many, they are no floating-point numbers, or their file cannot be read.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) -> Result<(), CheckpointError> {
        match self.dtype {
            Dtype::F32 => self.fill(self.place(start, out.len())?, bytemuck::cast_slice_mut(out)),
            _ => self.convert(start, out, to_f32),
        }
    }

    /// The elements from `start` on as `f16`, rounded to nearest even once.
    ///
    /// # Errors
    /// There are not so many, they are no floating-point numbers, or their file cannot be read.
    pub fn read_f16(&self, start: usize, out: &mut [f16]) -> Result<(), CheckpointError> {
        match self.dtype {
            Dtype::F16 => self.fill(self.place(start, out.len())?, bytemuck::cast_slice_mut(out)),
            _ => self.convert(start, out, to_f16),
        }
    }

    /// The I8 elements from `start` on.
    ///
    /// # Errors
    /// There are not so many, they are of another type, or their file cannot be read.
    pub fn read_i8(&self, start: usize, out: &mut [i8]) -> Result<(), CheckpointError> {
        if self.dtype != Dtype::I8 {
            return Err(CheckpointError::Elements {
                found: self.dtype,
                wanted: "I8 codes",
            });
        }
        self.fill(self.place(start, out.len())?, bytemuck::cast_slice_mut(out))
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
/// memory as a whole where it stands in its file in one piece.
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
    let (mut room, mut other_room) = (Vec::new(), Vec::new());
    for start in (0..one.len).step_by(COMPARED) {
        let len = (one.len - start).min(COMPARED);
        let bytes = one.bytes(start, len, &mut room)?;
        if bytes != other.bytes(start, len, &mut other_room)? {
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
}
