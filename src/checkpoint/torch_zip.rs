//! The PyTorch zip format: an atomic, streaming writer of one file of tensors.
//!
//! What `torch.save` makes of a dictionary of tensors since PyTorch 1.6: a zip archive of stored (not
//! compressed) entries, `data.pkl` with the names and shapes, one entry `data/N` per storage, whose bytes
//! begin at a multiple of 64 so that they can be mapped, `byteorder` and `version`. The pickle is of
//! protocol 2 and asks for nothing but what `torch.load(weights_only=True)` allows.

use std::io::{self, Write};
use std::path::Path;

use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

use super::{CheckpointError, Dtype, HostTensor, durable};

/// Where the bytes of a storage begin: at a multiple of this.
const ALIGNMENT: u16 = 64;

/// The version of the format in the entry `version`, as PyTorch has written it since 1.6.
const VERSION: &[u8] = b"3\n";

/// From this size on an entry needs the zip format's wide fields.
const WIDE: u64 = u32::MAX as u64;

/// Writes tensors as one PyTorch file, a dictionary from name to contiguous tensor in the order given,
/// atomically. Each tensor gets a storage of its own.
///
/// # Errors
/// A tensor's shape and bytes disagree, a name comes twice, or the file cannot be written.
pub fn write_torch<'a, S: AsRef<str>>(
    path: &Path,
    tensors: impl IntoIterator<Item = (S, &'a HostTensor)>,
) -> Result<(), CheckpointError> {
    let tensors: Vec<(S, &HostTensor)> = tensors.into_iter().collect();
    let mut names = std::collections::BTreeSet::new();
    for (name, tensor) in &tensors {
        let name = name.as_ref();
        tensor
            .check()
            .map_err(|cause| cause.in_tensor(path, name))?;
        if !names.insert(name) {
            let reason = format!("the tensor name '{name}' comes twice");
            return Err(CheckpointError::mismatch(path, reason));
        }
    }
    // PyTorch calls the folder in the archive after the file.
    let root = path.file_stem().and_then(|stem| stem.to_str());
    let root = root.unwrap_or("archive");
    let pickle = pickle(&tensors).map_err(|reason| CheckpointError::mismatch(path, reason))?;
    durable::write_file(path, |out| {
        let mut archive = ZipWriter::new_stream(out);
        let mut entry = |name: String, bytes: &[u8]| {
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Stored)
                .large_file(bytes.len() as u64 >= WIDE)
                .with_alignment(ALIGNMENT);
            archive.start_file(format!("{root}/{name}"), options)?;
            archive.write_all(bytes)
        };
        entry("data.pkl".to_owned(), &pickle)?;
        entry("byteorder".to_owned(), b"little")?;
        for (key, (_, tensor)) in tensors.iter().enumerate() {
            entry(format!("data/{key}"), &tensor.bytes)?;
        }
        entry("version".to_owned(), VERSION)?;
        archive.finish().map_err(io::Error::from)?;
        Ok(())
    })
}

/// The storage class of an element type, in the module `torch`.
fn storage_class(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "HalfStorage",
        Dtype::Bf16 => "BFloat16Storage",
        Dtype::F32 => "FloatStorage",
        Dtype::F64 => "DoubleStorage",
        Dtype::I8 => "CharStorage",
        Dtype::U8 => "ByteStorage",
        Dtype::I16 => "ShortStorage",
        Dtype::I32 => "IntStorage",
        Dtype::I64 => "LongStorage",
        Dtype::Bool => "BoolStorage",
    }
}

/// The dictionary as a pickle; storages are persistent ids, by the number of their entry.
fn pickle<S: AsRef<str>>(tensors: &[(S, &HostTensor)]) -> Result<Vec<u8>, String> {
    let mut out = Pickle(vec![0x80, 2]);
    out.op(b'}');
    out.op(b'(');
    for (key, (name, tensor)) in tensors.iter().enumerate() {
        out.text(name.as_ref())?;
        out.global("torch._utils", "_rebuild_tensor_v2");
        out.op(b'(');
        out.op(b'(');
        out.text("storage")?;
        out.global("torch", storage_class(tensor.dtype));
        out.text(&key.to_string())?;
        out.text("cpu")?;
        out.number(tensor.bytes.len() / tensor.dtype.size());
        out.op(b't');
        // BINPERSID: the storage itself.
        out.op(b'Q');
        // Where the tensor begins in it, in elements.
        out.number(0);
        out.numbers(&tensor.shape);
        out.numbers(&contiguous(&tensor.shape));
        // requires_grad: false; then backward hooks: none.
        out.op(b'\x89');
        out.global("collections", "OrderedDict");
        out.op(b')');
        out.op(b'R');
        out.op(b't');
        out.op(b'R');
    }
    out.op(b'u');
    out.op(b'.');
    Ok(out.0)
}

/// Elements from one index to the next, of each dimension; an extent of 0 counts as 1, as in PyTorch.
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut step = 1_usize;
    let mut strides: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&extent| {
            let stride = step;
            step = step.saturating_mul(extent.max(1));
            stride
        })
        .collect();
    strides.reverse();
    strides
}

/// A pickle in the making.
struct Pickle(Vec<u8>);

impl Pickle {
    fn op(&mut self, op: u8) {
        self.0.push(op);
    }

    fn text(&mut self, text: &str) -> Result<(), String> {
        let len = u32::try_from(text.len()).map_err(|_| "a tensor name is too long".to_owned())?;
        self.op(b'X');
        self.0.extend(len.to_le_bytes());
        self.0.extend(text.as_bytes());
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) {
        self.op(b'c');
        self.0.extend(format!("{module}\n{name}\n").as_bytes());
    }

    fn number(&mut self, number: usize) {
        match i32::try_from(number) {
            Ok(number) => {
                self.op(b'J');
                self.0.extend(number.to_le_bytes());
            }
            Err(_) => {
                // LONG1: two's complement in as many bytes as said; nine hold any `usize`.
                self.0.extend([b'\x8a', 9]);
                self.0.extend((number as u64).to_le_bytes());
                self.op(0);
            }
        }
    }

    fn numbers(&mut self, numbers: &[usize]) {
        self.op(b'(');
        numbers.iter().for_each(|&number| self.number(number));
        self.op(b't');
    }
}
