//! What stands at the end of a Parquet file: its schema and where its columns are. It is looked
//! through before the crate reads it, whose recursion and reservations follow what it says.

use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};

use super::contained::contained;
use super::source::Source;
use super::thrift::{I32, LIST, Malformed, STRUCT, Thrift};

/// The bytes that a file begins and ends with.
pub(in crate::data) const MAGIC: [u8; 4] = *b"PAR1";
const ENCRYPTED: [u8; 4] = *b"PARE";

/// Longest footer that is read, in bytes; that of a hundred columns in a thousand row groups is about
/// as long.
const MAX_FOOTER: u64 = 16 << 20;
/// Most columns and groups, and how deep they may stand in each other.
const MAX_ELEMENTS: usize = 10_000;
const MAX_DEPTH: usize = 32;

/// Reads the footer of a file.
pub(super) fn read(source: &Source) -> Result<ParquetMetaData, String> {
    let bytes = source.length();
    let tail: [u8; 8] = match bytes.checked_sub(8) {
        Some(at) if bytes >= 12 => source.read(at, 8)?.try_into().unwrap_or_default(),
        _ => return Err("it is too short for a Parquet file; is it complete?".to_owned()),
    };
    let [a, b, c, d, magic @ ..] = tail;
    if magic == ENCRYPTED {
        return Err("it is encrypted; write it again without encryption".to_owned());
    }
    if magic != MAGIC {
        return Err("it does not end as a Parquet file does; is it complete?".to_owned());
    }
    let length = u64::from(u32::from_le_bytes([a, b, c, d]));
    if length > MAX_FOOTER.min(bytes - 12) {
        return Err(format!(
            "its footer is said to have {length} bytes; a file of {bytes} bytes may have {}",
            MAX_FOOTER.min(bytes - 12)
        ));
    }
    let footer = source.read(bytes - 8 - length, length)?;
    check_schema(&footer).map_err(|malformed| match malformed {
        Malformed::Ends => "its footer is cut off".to_owned(),
        Malformed::Rule(what) => format!("its footer is damaged ({what})"),
    })?;
    contained(|| ParquetMetaDataReader::decode_metadata(&footer))
}

/// Checks the tree of the schema, which is a list of elements that say how many children they have.
fn check_schema(footer: &[u8]) -> Result<(), Malformed> {
    let mut thrift = Thrift::new(footer);
    let mut last = 0;
    while let Some(field) = thrift.field(&mut last)? {
        if field != (2, LIST) {
            thrift.skip(field.1)?;
            continue;
        }
        let (count, kind) = thrift.list()?;
        if kind != STRUCT || count > MAX_ELEMENTS {
            return Err(Malformed::Rule("a schema of too many columns"));
        }
        // Children that are still to come, of every group that is open.
        let mut open: Vec<u32> = Vec::new();
        for _ in 0..count {
            let children = children(&mut thrift)?;
            if children as usize > count {
                return Err(Malformed::Rule("a group with more columns than there are"));
            }
            if let Some(left) = open.last_mut() {
                *left -= 1;
            }
            if children > 0 {
                open.push(children);
            }
            while open.last() == Some(&0) {
                open.pop();
            }
            if open.len() > MAX_DEPTH {
                return Err(Malformed::Rule("columns nested too deep"));
            }
        }
    }
    Ok(())
}

/// The number of children of one element of the schema.
fn children(thrift: &mut Thrift<'_>) -> Result<u32, Malformed> {
    let (mut last, mut children) = (0, 0);
    while let Some(field) = thrift.field(&mut last)? {
        match field {
            (5, I32) => children = thrift.size()?,
            (_, kind) => thrift.skip(kind)?,
        }
    }
    Ok(children)
}
