//! The protobuf wire format, as far as ModelProto needs it: no schema, nothing allocated on the
//! word of a length. About a hundred lines, where a protobuf crate would add a generator and its
//! runtime for a dozen fields.

use super::error::SentencePieceError;

/// A field's value, by wire type.
#[derive(Clone, Copy, Debug)]
pub(super) enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// One field of a message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Field<'a> {
    pub(super) number: u32,
    pub(super) value: Value<'a>,
    /// Where the value starts in the file.
    pub(super) offset: usize,
    /// Key and value as they stand in the file.
    pub(super) raw: &'a [u8],
}

impl<'a> Field<'a> {
    pub(super) fn bytes(&self, name: &str) -> Result<&'a [u8], SentencePieceError> {
        match self.value {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(self.mistyped(name, "text or bytes")),
        }
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str, SentencePieceError> {
        let bytes = self.bytes(name)?;
        std::str::from_utf8(bytes).map_err(|_| malformed(self.offset, format!("{name}: no UTF-8")))
    }

    pub(super) fn varint(&self, name: &str) -> Result<u64, SentencePieceError> {
        match self.value {
            Value::Varint(number) => Ok(number),
            _ => Err(self.mistyped(name, "an integer")),
        }
    }

    pub(super) fn float(&self, name: &str) -> Result<f32, SentencePieceError> {
        match self.value {
            Value::Fixed32(bits) => Ok(f32::from_bits(bits)),
            _ => Err(self.mistyped(name, "a float")),
        }
    }

    fn mistyped(&self, name: &str, wanted: &str) -> SentencePieceError {
        malformed(self.offset, format!("{name}: {wanted} expected"))
    }
}

/// Walks the fields of one message.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where the message starts in the file, for messages.
    start: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8], start: usize) -> Self {
        Self {
            bytes,
            at: 0,
            start,
        }
    }

    /// The next field, or `None` at the end of the message.
    pub(super) fn next_field(&mut self) -> Result<Option<Field<'a>>, SentencePieceError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let first = self.at;
        let key = self.varint()?;
        let number = u32::try_from(key >> 3).unwrap_or(0);
        if number == 0 {
            return Err(malformed(
                self.start + first,
                format!("field key {key} is invalid"),
            ));
        }
        let mut offset = self.start + self.at;
        let value = match key & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Fixed64
            }
            2 => {
                let len = self.varint()?;
                offset = self.start + self.at;
                Value::Bytes(self.take(len)?)
            }
            5 => {
                let mut bits = [0; 4];
                bits.copy_from_slice(self.take(4)?);
                Value::Fixed32(u32::from_le_bytes(bits))
            }
            other => {
                return Err(malformed(
                    self.start + first,
                    format!("field {number} has wire type {other}"),
                ));
            }
        };
        Ok(Some(Field {
            number,
            value,
            offset,
            raw: &self.bytes[first..self.at],
        }))
    }

    fn varint(&mut self) -> Result<u64, SentencePieceError> {
        let first = self.at;
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let Some(&byte) = self.bytes.get(self.at) else {
                return Err(malformed(
                    self.start + first,
                    "it ends inside a number".to_owned(),
                ));
            };
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed(
            self.start + first,
            "a number of more than ten bytes".to_owned(),
        ))
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], SentencePieceError> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(len) {
            Ok(len) if len <= left => {
                let taken = &self.bytes[self.at..self.at + len];
                self.at += len;
                Ok(taken)
            }
            _ => Err(malformed(
                self.start + self.at,
                format!("a field of {len} bytes where {left} are left"),
            )),
        }
    }
}

pub(super) fn malformed(offset: usize, problem: String) -> SentencePieceError {
    SentencePieceError::Malformed { offset, problem }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends a varint field.
pub(super) fn put_number(out: &mut Vec<u8>, number: u32, value: u64) {
    put_varint(out, u64::from(number) << 3);
    put_varint(out, value);
}

/// Appends a length-delimited field.
pub(super) fn put_bytes(out: &mut Vec<u8>, number: u32, value: &[u8]) {
    put_varint(out, u64::from(number) << 3 | 2);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// Appends a float field.
pub(super) fn put_float(out: &mut Vec<u8>, number: u32, value: f32) {
    put_varint(out, u64::from(number) << 3 | 5);
    out.extend_from_slice(&value.to_le_bytes());
}
