//! The header of a page (`PageHeader` in parquet.thrift).

use parquet::basic::Encoding;

use super::thrift::{I32, Malformed, STRUCT, Thrift};

/// What a page holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Kind {
    /// Values, of the first version.
    #[default]
    V1,
    /// Nothing that is read.
    Index,
    /// The values that others refer to.
    Dictionary,
    /// Values, of the second version.
    V2,
}

/// What the header of a page says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub kind: Kind,
    pub uncompressed: u32,
    pub compressed: u32,
    pub num_values: u32,
    encoding: u32,
    /// Encodings of definition and repetition levels; of the second version always RLE.
    level_encodings: [u32; 2],
    pub num_nulls: u32,
    pub num_rows: u32,
    pub def_bytes: u32,
    pub rep_bytes: u32,
    pub is_compressed: bool,
}

const RLE: u32 = 3;

impl Header {
    /// A header and its length in bytes; of bytes that may go on `None`, else what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<(Self, usize), Option<&'static str>> {
        let mut thrift = Thrift::new(bytes);
        let header = Self::read(&mut thrift).map_err(|malformed| match malformed {
            Malformed::Ends => None,
            Malformed::Rule(what) => Some(what),
        })?;
        Ok((header, thrift.position()))
    }

    fn read(thrift: &mut Thrift<'_>) -> Result<Self, Malformed> {
        let mut header = Self {
            level_encodings: [RLE; 2],
            is_compressed: true,
            ..Self::default()
        };
        let mut last = 0;
        let mut described = None;
        while let Some(field) = thrift.field(&mut last)? {
            match field {
                (1, I32) => {
                    header.kind = match thrift.size()? {
                        0 => Kind::V1,
                        1 => Kind::Index,
                        2 => Kind::Dictionary,
                        3 => Kind::V2,
                        _ => return Err(Malformed::Rule("an unknown kind of page")),
                    };
                }
                (2, I32) => header.uncompressed = thrift.size()?,
                (3, I32) => header.compressed = thrift.size()?,
                (number @ (5 | 7 | 8), STRUCT) => {
                    header.values(thrift, number)?;
                    described = Some(number);
                }
                (_, kind) => thrift.skip(kind)?,
            }
        }
        let expected = match header.kind {
            Kind::V1 => Some(5),
            Kind::Dictionary => Some(7),
            Kind::V2 => Some(8),
            Kind::Index => described,
        };
        match described == expected {
            true => Ok(header),
            false => Err(Malformed::Rule("a page without a description")),
        }
    }

    /// The part of the header that belongs to one kind of page, which is that field.
    fn values(&mut self, thrift: &mut Thrift<'_>, kind: i16) -> Result<(), Malformed> {
        let mut last = 0;
        while let Some((number, found)) = thrift.field(&mut last)? {
            let place = match (kind, number) {
                (_, 1) => &mut self.num_values,
                (5 | 7, 2) | (8, 4) => &mut self.encoding,
                (5, 3) => &mut self.level_encodings[0],
                (5, 4) => &mut self.level_encodings[1],
                (8, 2) => &mut self.num_nulls,
                (8, 3) => &mut self.num_rows,
                (8, 5) => &mut self.def_bytes,
                (8, 6) => &mut self.rep_bytes,
                (8, 7) => {
                    self.is_compressed = Thrift::is_true(found);
                    thrift.skip(found)?;
                    continue;
                }
                _ => {
                    thrift.skip(found)?;
                    continue;
                }
            };
            match found {
                I32 => *place = thrift.size()?,
                _ => return Err(Malformed::Rule("a number of another type")),
            }
        }
        Ok(())
    }

    /// How the values are encoded.
    pub fn encoding(&self) -> Result<Encoding, String> {
        if self.kind == Kind::V1 && self.level_encodings != [RLE; 2] {
            return Err("its levels are packed in a way given up in 2013".to_owned());
        }
        Ok(match self.encoding {
            0 => Encoding::PLAIN,
            2 => Encoding::PLAIN_DICTIONARY,
            RLE => Encoding::RLE,
            5 => Encoding::DELTA_BINARY_PACKED,
            6 => Encoding::DELTA_LENGTH_BYTE_ARRAY,
            8 => Encoding::RLE_DICTIONARY,
            9 => Encoding::BYTE_STREAM_SPLIT,
            other => {
                let name = if other == 7 {
                    "DELTA_BYTE_ARRAY"
                } else {
                    "unknown"
                };
                return Err(format!(
                    "a column has the encoding {other} ({name}), which is not read; write it again \
                     without choosing an encoding"
                ));
            }
        })
    }
}

/// How many numbers follow the header of a DELTA_BINARY_PACKED block, as it says itself.
pub(super) fn delta_total(bytes: &[u8]) -> Option<u64> {
    let mut bytes = bytes.iter();
    // Block size, parts of a block, numbers.
    let mut number = || {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = *bytes.next()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    };
    number()?;
    number()?;
    number()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A dictionary page: 100 bytes in 50, 7 values, PLAIN.
    const DICTIONARY: [u8; 14] = [
        0x15, 4, 0x15, 0xc8, 1, 0x15, 100, 0x4c, 0x15, 14, 0x15, 0, 0, 0,
    ];

    #[test]
    fn a_header_is_read_to_its_end_and_no_further() {
        let bytes = [&DICTIONARY[..], b"values"].concat();
        let (header, length) = Header::parse(&bytes).unwrap();
        assert_eq!(length, DICTIONARY.len());
        let expected = (Kind::Dictionary, 100, 50, 7);
        let found = (
            header.kind,
            header.uncompressed,
            header.compressed,
            header.num_values,
        );
        assert_eq!(found, expected);
        assert_eq!(header.encoding(), Ok(Encoding::PLAIN));
        for end in 0..DICTIONARY.len() {
            assert_eq!(Header::parse(&DICTIONARY[..end]), Err(None), "{end}");
        }
    }

    #[test]
    fn headers_that_contradict_themselves_are_refused() {
        let changed = |at: usize, byte: u8| {
            let mut bytes = DICTIONARY;
            bytes[at] = byte;
            Header::parse(&bytes).unwrap_err()
        };
        assert_eq!(changed(1, 20), Some("an unknown kind of page"));
        // Said to hold values of the first version, and describes a dictionary.
        assert_eq!(changed(1, 0), Some("a page without a description"));
        assert_eq!(changed(6, 101), Some("a negative or huge size"));
        let long = [
            0x15, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1,
        ];
        assert_eq!(
            Header::parse(&long),
            Err(Some("a number of more than ten bytes"))
        );
        // A field of structs in structs in structs.
        let deep = [0xfc; 100];
        assert_eq!(Header::parse(&deep), Err(Some("structs nested too deep")));
    }

    #[test]
    fn the_total_of_a_delta_block_is_its_third_number() {
        assert_eq!(delta_total(&[0x80, 1, 4, 0xac, 2, 9]), Some(300));
        assert_eq!(delta_total(&[0x80, 1, 4, 0xac]), None);
        assert_eq!(delta_total(&[0xff; 40]), None);
    }
}
