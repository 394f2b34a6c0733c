//! As much of Thrift's compact protocol as it takes to look at headers before anybody trusts them.
//! <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>

/// Why bytes are no header: cut off, or against the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Malformed {
    /// They end early.
    Ends,
    /// They break a rule.
    Rule(&'static str),
}

/// How deep structs may stand in each other; Parquet's own headers need five.
const MAX_DEPTH: usize = 16;

/// Types of fields and elements.
pub(super) const I16: u8 = 4;
pub(super) const I32: u8 = 5;
pub(super) const I64: u8 = 6;
pub(super) const BINARY: u8 = 8;
pub(super) const LIST: u8 = 9;
pub(super) const STRUCT: u8 = 12;

/// Reads forward; nothing is kept.
#[derive(Clone, Debug)]
pub(super) struct Thrift<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Thrift<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// How many bytes were read.
    pub fn position(&self) -> usize {
        self.at
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        let byte = self.bytes.get(self.at).ok_or(Malformed::Ends)?;
        self.at += 1;
        Ok(*byte)
    }

    fn pass(&mut self, bytes: usize) -> Result<(), Malformed> {
        let end = self.at.checked_add(bytes).ok_or(Malformed::Ends)?;
        if end > self.bytes.len() {
            return Err(Malformed::Ends);
        }
        self.at = end;
        Ok(())
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Malformed::Rule("a number of more than ten bytes"))
    }

    fn zigzag(&mut self) -> Result<i64, Malformed> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A number of at most 32 bits that is not negative.
    pub fn size(&mut self) -> Result<u32, Malformed> {
        u32::try_from(self.zigzag()?)
            .ok()
            .filter(|size| *size <= i32::MAX as u32)
            .ok_or(Malformed::Rule("a negative or huge size"))
    }

    /// The next field of a struct: its number, after `last`, and its type; `None` at the end.
    pub fn field(&mut self, last: &mut i16) -> Result<Option<(i16, u8)>, Malformed> {
        let head = self.byte()?;
        if head == 0 {
            return Ok(None);
        }
        let number = match head >> 4 {
            0 => self.zigzag()?,
            delta => i64::from(*last) + i64::from(delta),
        };
        *last = i16::try_from(number).map_err(|_| Malformed::Rule("a field number"))?;
        Ok(Some((*last, head & 0x0f)))
    }

    /// The head of a list: number of elements, each of which takes a byte at least, and their type.
    pub fn list(&mut self) -> Result<(usize, u8), Malformed> {
        let head = self.byte()?;
        let count = match head >> 4 {
            15 => usize::try_from(self.varint()?).map_err(|_| Malformed::Ends)?,
            count => usize::from(count),
        };
        if count > self.bytes.len() - self.at {
            return Err(Malformed::Ends);
        }
        Ok((count, head & 0x0f))
    }

    /// Passes over a value of this type, in a field.
    pub fn skip(&mut self, kind: u8) -> Result<(), Malformed> {
        self.skip_at(kind, 0, false)
    }

    fn skip_at(&mut self, kind: u8, depth: usize, in_list: bool) -> Result<(), Malformed> {
        if depth > MAX_DEPTH {
            return Err(Malformed::Rule("structs nested too deep"));
        }
        match kind {
            // In a field the type is the value.
            1 | 2 if !in_list => Ok(()),
            1..=3 => self.pass(1),
            I16 | I32 | I64 => self.varint().map(drop),
            7 => self.pass(8),
            BINARY => {
                let bytes = self.varint()?;
                self.pass(usize::try_from(bytes).map_err(|_| Malformed::Ends)?)
            }
            LIST | 10 => {
                let (count, element) = self.list()?;
                (0..count).try_for_each(|_| self.skip_at(element, depth + 1, true))
            }
            11 => {
                let count = self.varint()?;
                if count == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                for _ in 0..count {
                    self.skip_at(kinds >> 4, depth + 1, true)?;
                    self.skip_at(kinds & 0x0f, depth + 1, true)?;
                }
                Ok(())
            }
            STRUCT => {
                let mut last = 0;
                while let Some((_, kind)) = self.field(&mut last)? {
                    self.skip_at(kind, depth + 1, false)?;
                }
                Ok(())
            }
            _ => Err(Malformed::Rule("an unknown type")),
        }
    }

    /// The value of a boolean field, which is its type.
    pub fn is_true(kind: u8) -> bool {
        kind == 1
    }
}
