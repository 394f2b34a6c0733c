//! What of a pickle `torch.save` needs for a dictionary of tensors, and nothing else.
//!
//! A pickle is a program, and Python's own reader runs whatever it names. This one knows the
//! instructions that build numbers, texts, tuples, dictionaries and tensors, and the few names these
//! need; everything else is refused by its name before any other reader sees the file. Values are
//! numbers of entries in one list, so that neither depth nor sharing costs anything, and the list is
//! bounded.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::{Dtype, MAX_RANK};

/// The most bytes of a pickle: fifty times that of ChatGLM-6B in one file.
pub(super) const MAX_PICKLE_BYTES: u64 = 8 << 20;

/// The most values in a pickle, of which a tensor takes about twenty.
const MAX_VALUES: usize = 1 << 20;

/// The most bytes of a text; names of tensors have a hundred.
const MAX_TEXT: usize = 4096;

/// The elements of a tensor within a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Name of the storage in its file.
    pub storage: Arc<str>,
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
    Text(Arc<str>),
    Name(Name),
    Tuple(Vec<Id>),
    Dictionary(Vec<(Id, Id)>),
    Storage { name: Arc<str>, dtype: Dtype },
    Tensor(Box<Place>),
    Other,
}

/// The names that a dictionary of tensors needs.
#[derive(Clone, Copy)]
enum Name {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Dtype),
}

impl Name {
    fn of(module: &str, name: &str) -> Result<Self, String> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Self::RebuildParameter,
            ("torch", "HalfStorage") => Self::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Self::Storage(Dtype::Bf16),
            ("torch", "FloatStorage") => Self::Storage(Dtype::F32),
            ("torch", "DoubleStorage") => Self::Storage(Dtype::F64),
            ("torch", "CharStorage") => Self::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Self::Storage(Dtype::U8),
            ("torch", "ShortStorage") => Self::Storage(Dtype::I16),
            ("torch", "IntStorage") => Self::Storage(Dtype::I32),
            ("torch", "LongStorage") => Self::Storage(Dtype::I64),
            ("torch", "BoolStorage") => Self::Storage(Dtype::Bool),
            _ => {
                return Err(format!(
                    "its pickle asks for '{module}.{name}', which no dictionary of tensors needs and \
                     which was not run"
                ));
            }
        })
    }
}

struct Machine<'a> {
    pickle: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

/// The tensors of the dictionary at the beginning of `pickle`, by name, and what stands behind it.
///
/// # Errors
/// It holds anything else, or makes no sense: what and where.
pub(super) fn tensors(pickle: &[u8]) -> Result<(BTreeMap<String, Place>, &[u8]), String> {
    let (machine, root) = run(pickle)?;
    let Value::Dictionary(entries) = &machine.values[root] else {
        return Err("it holds no dictionary of tensors, as a model's state_dict() is".to_owned());
    };
    let mut tensors = BTreeMap::new();
    for &(name, value) in entries {
        let Value::Text(name) = &machine.values[name] else {
            return Err("its dictionary has a key that is no text".to_owned());
        };
        let Value::Tensor(place) = &machine.values[value] else {
            return Err(format!(
                "its entry '{name}' is no tensor; a model's state_dict() has nothing else"
            ));
        };
        if tensors
            .insert(name.to_string(), Place::clone(place))
            .is_some()
        {
            return Err(format!("tensor '{name}' comes twice"));
        }
    }
    Ok((tensors, machine.pickle))
}

/// What stands behind the pickle at the beginning of `pickle`.
///
/// # Errors
/// As [`tensors`].
pub(super) fn behind(pickle: &[u8]) -> Result<&[u8], String> {
    Ok(run(pickle)?.0.pickle)
}

fn run(pickle: &[u8]) -> Result<(Machine<'_>, Id), String> {
    let mut machine = Machine {
        pickle,
        values: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
    };
    loop {
        let at = pickle.len() - machine.pickle.len();
        let at_byte = |reason| format!("{reason} (at byte {at} of its pickle)");
        if !machine.step().map_err(at_byte)? {
            let root = machine.pop().map_err(at_byte)?;
            return Ok((machine, root));
        }
    }
}

fn nonsense() -> String {
    "its pickle makes no sense".to_owned()
}

impl<'a> Machine<'a> {
    /// Carries out one instruction; `false` at the end.
    fn step(&mut self) -> Result<bool, String> {
        let [code] = self.bytes()?;
        match code {
            0x80 => {
                let [_protocol] = self.bytes()?;
            }
            0x95 => {
                let [..]: [u8; 8] = self.bytes()?;
            }
            b'.' => return Ok(false),
            b'(' => self.marks.push(self.stack.len()),
            b'}' => self.push(Value::Dictionary(Vec::new()))?,
            b')' => self.push(Value::Tuple(Vec::new()))?,
            b']' | b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
            b'G' => {
                let [..]: [u8; 8] = self.bytes()?;
                self.push(Value::Other)?;
            }
            b'J' => {
                let number = i32::from_le_bytes(self.bytes()?);
                self.push(Value::Number(number.into()))?;
            }
            b'K' => {
                let [number] = self.bytes()?;
                self.push(Value::Number(number.into()))?;
            }
            b'M' => {
                let number = u16::from_le_bytes(self.bytes()?);
                self.push(Value::Number(number.into()))?;
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
                let name = Name::of(self.line()?, self.line()?)?;
                self.push(Value::Name(name))?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) =
                    (&self.values[module], &self.values[name])
                else {
                    return Err(nonsense());
                };
                let name = Name::of(module, name)?;
                self.push(Value::Name(name))?;
            }
            b'q' => {
                let [key] = self.bytes()?;
                self.memoise(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.bytes()?);
                self.memoise(key)?;
            }
            0x94 => self.memoise(self.memo.len() as u32)?,
            b'h' => {
                let [key] = self.bytes()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.bytes()?);
                self.recall(key)?;
            }
            b't' => {
                let items = self.marked()?;
                self.push(Value::Tuple(items))?;
            }
            0x85..=0x87 => {
                let count = usize::from(code - 0x84);
                let at = self.stack.len().checked_sub(count).ok_or_else(nonsense)?;
                let items = self.stack.split_off(at);
                self.push(Value::Tuple(items))?;
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
            // The versions of its modules, which torch keeps beside a state_dict.
            b'b' => {
                let attributes = self.pop()?;
                let on = *self.stack.last().ok_or_else(nonsense)?;
                let (Value::Dictionary(_), Value::Dictionary(_)) =
                    (&self.values[on], &self.values[attributes])
                else {
                    return Err("its pickle builds an object that is no dictionary".to_owned());
                };
            }
            // Nothing is read from a list.
            b'a' => {
                self.pop()?;
                self.on_list()?;
            }
            b'e' => {
                self.marked()?;
                self.on_list()?;
            }
            _ => {
                return Err(format!(
                    "its pickle has the instruction {code:#04x}, which no dictionary of tensors needs"
                ));
            }
        }
        Ok(true)
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (bytes, rest) = self
            .pickle
            .split_first_chunk::<N>()
            .ok_or("its pickle is cut short")?;
        self.pickle = rest;
        Ok(*bytes)
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let reach = &self.pickle[..self.pickle.len().min(MAX_TEXT)];
        let end = reach.iter().position(|&byte| byte == b'\n');
        let (line, rest) = self.pickle.split_at(end.ok_or_else(nonsense)?);
        self.pickle = &rest[1..];
        std::str::from_utf8(line).map_err(|_| nonsense())
    }

    fn text(&mut self, len: usize) -> Result<(), String> {
        if len > MAX_TEXT {
            return Err(format!("its pickle has a text of {len} bytes"));
        }
        let (text, rest) = self
            .pickle
            .split_at_checked(len)
            .ok_or("its pickle is cut short")?;
        self.pickle = rest;
        let text = std::str::from_utf8(text).map_err(|_| nonsense())?;
        self.push(Value::Text(text.into()))
    }

    /// A whole number; of more than eight bytes it is none that anything here needs.
    fn long(&mut self) -> Result<(), String> {
        let [len] = self.bytes()?;
        let (bytes, rest) = self
            .pickle
            .split_at_checked(len.into())
            .ok_or("its pickle is cut short")?;
        self.pickle = rest;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut number = [if negative { 0xff } else { 0 }; 8];
        self.push(match number.get_mut(..bytes.len()) {
            Some(low) => {
                low.copy_from_slice(bytes);
                Value::Number(i64::from_le_bytes(number))
            }
            None => Value::Other,
        })
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.values.len() == MAX_VALUES {
            return Err(format!("its pickle has more than {MAX_VALUES} values"));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Id, String> {
        self.stack.pop().ok_or_else(nonsense)
    }

    fn memoise(&mut self, key: u32) -> Result<(), String> {
        if self.memo.len() == MAX_VALUES {
            return Err(format!(
                "its pickle remembers more than {MAX_VALUES} values"
            ));
        }
        let value = *self.stack.last().ok_or_else(nonsense)?;
        self.memo.insert(key, value);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<(), String> {
        let value = *self.memo.get(&key).ok_or_else(nonsense)?;
        self.stack.push(value);
        Ok(())
    }

    /// What was pushed since the last mark.
    fn marked(&mut self) -> Result<Vec<Id>, String> {
        let at = self.marks.pop().filter(|&at| at <= self.stack.len());
        Ok(self.stack.split_off(at.ok_or_else(nonsense)?))
    }

    /// Adds keys and values, in turn, to the dictionary on the stack.
    fn set(&mut self, items: &[Id]) -> Result<(), String> {
        let (pairs, []) = items.as_chunks::<2>() else {
            return Err(nonsense());
        };
        let on = *self.stack.last().ok_or_else(nonsense)?;
        let Value::Dictionary(entries) = &mut self.values[on] else {
            return Err(nonsense());
        };
        entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn on_list(&self) -> Result<(), String> {
        match self.stack.last().map(|&on| &self.values[on]) {
            Some(Value::Other) => Ok(()),
            _ => Err(nonsense()),
        }
    }

    fn tuple(&self, id: Id) -> Result<&[Id], String> {
        match &self.values[id] {
            Value::Tuple(items) => Ok(items),
            _ => Err(nonsense()),
        }
    }

    fn count(&self, id: Id, what: &str) -> Result<usize, String> {
        match &self.values[id] {
            Value::Number(number) => usize::try_from(*number)
                .map_err(|_| format!("one of its tensors has the {what} {number}")),
            _ => Err(nonsense()),
        }
    }

    fn counts(&self, id: Id, what: &str) -> Result<Vec<usize>, String> {
        let items = self.tuple(id)?;
        if items.len() > MAX_RANK {
            let rank = items.len();
            return Err(format!("one of its tensors has {rank} dimensions"));
        }
        items.iter().map(|&item| self.count(item, what)).collect()
    }

    /// `("storage", torch.HalfStorage, name, device, elements)`, and in the older stream files a view
    /// of another storage or nothing.
    fn storage(&mut self) -> Result<(), String> {
        let reference = self.pop()?;
        let (&[tag, kind, name, _, elements] | &[tag, kind, name, _, elements, _]) =
            self.tuple(reference)?
        else {
            return Err(nonsense());
        };
        let storage = match [tag, kind, name].map(|id| &self.values[id]) {
            [
                Value::Text(tag),
                Value::Name(Name::Storage(dtype)),
                Value::Text(name),
            ] if **tag == *"storage" => Value::Storage {
                name: Arc::clone(name),
                dtype: *dtype,
            },
            _ => return Err(nonsense()),
        };
        self.count(elements, "storage length")?;
        self.push(storage)
    }

    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.tuple(arguments)?;
        let Value::Name(function) = &self.values[function] else {
            return Err(nonsense());
        };
        let value = match (function, arguments) {
            (Name::OrderedDict, []) => Value::Dictionary(Vec::new()),
            (Name::RebuildTensor, &[storage, offset, shape, stride, _, _]) => {
                let Value::Storage { name, dtype } = &self.values[storage] else {
                    return Err(nonsense());
                };
                let place = Place {
                    storage: Arc::clone(name),
                    dtype: *dtype,
                    offset: self.count(offset, "offset")?,
                    shape: self.counts(shape, "extent")?,
                    stride: self.counts(stride, "stride")?,
                };
                if place.shape.len() != place.stride.len() {
                    return Err(format!(
                        "one of its tensors has shape {:?} and strides {:?}",
                        place.shape, place.stride
                    ));
                }
                Value::Tensor(Box::new(place))
            }
            (Name::RebuildParameter, &[tensor, _, _]) => {
                let Value::Tensor(place) = &self.values[tensor] else {
                    return Err(nonsense());
                };
                Value::Tensor(place.clone())
            }
            _ => return Err(nonsense()),
        };
        self.push(value)
    }
}
