//! Where the tensors of a pickled dictionary stand in their storages.
//!
//! `pytorch-reader` gives a tensor's values, but not their place in the file. This reads as much of the
//! pickle as `torch.save` writes for a dictionary of tensors, and nothing is believed that the reader
//! does not say too: whatever is unknown here gives no place, and the tensor is read in the ordinary
//! way. Values are numbers of entries in one list, so that neither depth nor sharing costs anything, and
//! there is at most one for each byte of the pickle.

use std::collections::{BTreeMap, HashMap};

use super::Dtype;

/// The elements of a tensor within a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Name of the storage in its file.
    pub storage: String,
    /// Element type.
    pub dtype: Dtype,
    /// Elements in front of it.
    pub offset: usize,
    /// Extent of each dimension.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension.
    pub stride: Vec<usize>,
}

impl Place {
    /// Whether the elements stand one after another, the last index running fastest.
    pub fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        let dimensions = self.shape.iter().zip(&self.stride).rev();
        let contiguous = dimensions.into_iter().all(|(&extent, &stride)| {
            let fits = extent == 1 || stride == expected;
            expected = expected.saturating_mul(extent);
            fits
        });
        contiguous && self.shape.len() == self.stride.len()
    }
}

/// Place of a value in [`Machine::values`].
type Id = usize;

enum Value {
    Number(i64),
    Text(String),
    Global(String),
    Tuple(Vec<Id>),
    Dictionary(Vec<(Id, Id)>),
    Storage { name: String, dtype: Dtype },
    Tensor(Place),
    Other,
}

struct Machine<'a> {
    pickle: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

/// The places of the tensors in a pickled dictionary, by name; nothing where it is anything else.
pub(super) fn places(pickle: &[u8]) -> Option<BTreeMap<String, Place>> {
    let mut machine = Machine {
        pickle,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    while machine.step()? {}
    let Value::Dictionary(entries) = machine.values.get(*machine.stack.last()?)? else {
        return None;
    };
    let mut places = BTreeMap::new();
    for &(name, value) in entries {
        if let (Value::Text(name), Value::Tensor(place)) =
            (&machine.values[name], &machine.values[value])
        {
            places.insert(name.clone(), place.clone());
        }
    }
    Some(places)
}

impl<'a> Machine<'a> {
    /// Carries out one instruction; `false` at the end, nothing where it is unknown or makes no sense.
    fn step(&mut self) -> Option<bool> {
        let [code] = self.bytes()?;
        match code {
            0x80 => {
                let [_protocol] = self.bytes()?;
            }
            0x95 => {
                let [..]: [u8; 8] = self.bytes()?;
            }
            b'.' => return Some(false),
            b'(' => self.marks.push(self.stack.len()),
            b'}' => self.push(Value::Dictionary(Vec::new())),
            b')' => self.push(Value::Tuple(Vec::new())),
            b']' | b'N' | 0x88 | 0x89 => self.push(Value::Other),
            b'G' => {
                let [..]: [u8; 8] = self.bytes()?;
                self.push(Value::Other);
            }
            b'J' => {
                let number = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Number(number.into()));
            }
            b'K' => {
                let [number] = self.bytes()?;
                self.push(Value::Number(number.into()));
            }
            b'M' => {
                let number = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Number(number.into()));
            }
            0x8a => self.long()?,
            b'X' => {
                let len = u32::from_le_bytes(self.bytes()?);
                self.text(len as usize)?;
            }
            0x8c => {
                let [len] = self.bytes()?;
                self.text(len.into())?;
            }
            b'c' => {
                let global = format!("{}.{}", self.line()?, self.line()?);
                self.push(Value::Global(global));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) =
                    (&self.values[module], &self.values[name])
                else {
                    return None;
                };
                let global = format!("{module}.{name}");
                self.push(Value::Global(global));
            }
            b'q' => {
                let [key] = self.bytes()?;
                self.memo.insert(key.into(), *self.stack.last()?);
            }
            b'r' => {
                let key = u32::from_le_bytes(self.bytes()?);
                self.memo.insert(key, *self.stack.last()?);
            }
            0x94 => {
                let key = self.memo.len() as u32;
                self.memo.insert(key, *self.stack.last()?);
            }
            b'h' => {
                let [key] = self.bytes()?;
                self.stack.push(*self.memo.get(&key.into())?);
            }
            b'j' => {
                let key = u32::from_le_bytes(self.bytes()?);
                self.stack.push(*self.memo.get(&key)?);
            }
            b't' => {
                let items = self.marked()?;
                self.push(Value::Tuple(items));
            }
            0x85..=0x87 => {
                let at = self.stack.len().checked_sub(usize::from(code - 0x84))?;
                let items = self.stack.split_off(at);
                self.push(Value::Tuple(items));
            }
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(&[key, value])?;
            }
            b'u' => {
                let items = self.marked()?;
                self.set(&items)?;
            }
            // Lists, and the attributes of an object, hold no tensors here.
            b'a' | b'b' => {
                self.pop()?;
            }
            b'e' => {
                self.marked()?;
            }
            _ => return None,
        }
        Some(true)
    }

    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.pickle.split_first_chunk::<N>()?;
        self.pickle = rest;
        Some(*bytes)
    }

    fn line(&mut self) -> Option<&'a str> {
        let end = self.pickle.iter().position(|&byte| byte == b'\n')?;
        let (line, rest) = self.pickle.split_at(end);
        self.pickle = &rest[1..];
        std::str::from_utf8(line).ok()
    }

    fn text(&mut self, len: usize) -> Option<()> {
        let (text, rest) = self.pickle.split_at_checked(len)?;
        self.pickle = rest;
        let text = std::str::from_utf8(text).ok()?.to_owned();
        self.push(Value::Text(text));
        Some(())
    }

    /// A whole number of up to eight bytes.
    fn long(&mut self) -> Option<()> {
        let [len] = self.bytes()?;
        let (bytes, rest) = self.pickle.split_at_checked(len.into())?;
        self.pickle = rest;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        number.get_mut(..bytes.len())?.copy_from_slice(bytes);
        self.push(Value::Number(i64::from_le_bytes(number)));
        Some(())
    }

    fn push(&mut self, value: Value) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn pop(&mut self) -> Option<Id> {
        self.stack.pop()
    }

    /// What was pushed since the last mark.
    fn marked(&mut self) -> Option<Vec<Id>> {
        let at = self.marks.pop()?;
        (at <= self.stack.len()).then(|| self.stack.split_off(at))
    }

    /// Adds keys and values, in turn, to the dictionary on the stack.
    fn set(&mut self, items: &[Id]) -> Option<()> {
        let (pairs, rest) = items.as_chunks::<2>();
        let on = *self.stack.last()?;
        if let Value::Dictionary(entries) = &mut self.values[on] {
            entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        }
        rest.is_empty().then_some(())
    }

    fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.values.get(id)? {
            Value::Tuple(items) => Some(items),
            _ => None,
        }
    }

    fn count(&self, id: Id) -> Option<usize> {
        match self.values.get(id)? {
            Value::Number(number) => usize::try_from(*number).ok(),
            _ => None,
        }
    }

    fn counts(&self, id: Id) -> Option<Vec<usize>> {
        self.tuple(id)?
            .iter()
            .map(|&item| self.count(item))
            .collect()
    }

    /// `("storage", torch.HalfStorage, name, device, elements)`.
    fn storage(&mut self) -> Option<()> {
        let reference = self.pop()?;
        let storage = match *self.tuple(reference)? {
            [_, kind, name, _, _] => match (&self.values[kind], &self.values[name]) {
                (Value::Global(kind), Value::Text(name)) => match dtype(kind) {
                    Some(dtype) => Value::Storage {
                        name: name.clone(),
                        dtype,
                    },
                    None => Value::Other,
                },
                _ => return None,
            },
            _ => return None,
        };
        self.push(storage);
        Some(())
    }

    fn call(&mut self) -> Option<()> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.tuple(arguments)?;
        let Value::Global(function) = &self.values[function] else {
            return None;
        };
        let value = match (function.as_str(), arguments) {
            ("collections.OrderedDict", []) => Value::Dictionary(Vec::new()),
            ("torch._utils._rebuild_tensor_v2", &[storage, offset, shape, stride, ..]) => {
                match &self.values[storage] {
                    Value::Storage { name, dtype } => Value::Tensor(Place {
                        storage: name.clone(),
                        dtype: *dtype,
                        offset: self.count(offset)?,
                        shape: self.counts(shape)?,
                        stride: self.counts(stride)?,
                    }),
                    _ => Value::Other,
                }
            }
            ("torch._utils._rebuild_parameter", &[tensor, ..]) => {
                self.stack.push(tensor);
                return Some(());
            }
            _ => Value::Other,
        };
        self.push(value);
        Some(())
    }
}

fn dtype(storage: &str) -> Option<Dtype> {
    Some(match storage {
        "torch.HalfStorage" => Dtype::F16,
        "torch.BFloat16Storage" => Dtype::Bf16,
        "torch.FloatStorage" => Dtype::F32,
        "torch.DoubleStorage" => Dtype::F64,
        "torch.CharStorage" => Dtype::I8,
        "torch.ByteStorage" => Dtype::U8,
        "torch.ShortStorage" => Dtype::I16,
        "torch.IntStorage" => Dtype::I32,
        "torch.LongStorage" => Dtype::I64,
        _ => return None,
    })
}
