//! A reader of TensorBoard's event files, written from the format's description and not from the
//! writer: TFRecords with both checksums, protobuf messages within.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Step and value of every scalar in an output folder, by tag.
pub fn scalars(output: &Path) -> BTreeMap<String, Vec<(u64, f32)>> {
    let entries = fs::read_dir(output).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = paths
        .filter(|path| path.to_string_lossy().contains("tfevents"))
        .collect();
    files.sort();
    let mut found: BTreeMap<String, Vec<(u64, f32)>> = BTreeMap::new();
    for file in files {
        let bytes = fs::read(file).unwrap();
        let records = records(&bytes);
        let version = &fields(records[0])[&3];
        assert_eq!(version, &[Field::Bytes(b"brain.Event:2")]);
        for record in &records[1..] {
            let event = fields(record);
            let step = event[&2][0].number();
            let summary = fields(event[&5][0].bytes());
            for value in &summary[&1] {
                let value = fields(value.bytes());
                let tag = String::from_utf8(value[&1][0].bytes().to_vec()).unwrap();
                let scalar = f32::from_bits(u32::try_from(value[&2][0].number()).unwrap());
                found.entry(tag).or_default().push((step, scalar));
            }
        }
    }
    found
}

/// The records of a TFRecord file: length, its checksum, bytes, their checksum.
fn records(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let (length, rest) = bytes.split_first_chunk::<8>().unwrap();
        let (length_crc, rest) = rest.split_first_chunk::<4>().unwrap();
        assert_eq!(u32::from_le_bytes(*length_crc), masked_crc(length));
        let length = usize::try_from(u64::from_le_bytes(*length)).unwrap();
        let (record, rest) = rest.split_at(length);
        let (crc, rest) = rest.split_first_chunk::<4>().unwrap();
        assert_eq!(u32::from_le_bytes(*crc), masked_crc(record));
        records.push(record);
        bytes = rest;
    }
    records
}

/// CRC-32C, bit by bit, masked as TFRecord wants it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0_u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[test]
fn the_checksum_is_crc_32c() {
    // The check value of CRC-32C: that of "123456789".
    let masked = 0xe306_9283_u32.rotate_right(15).wrapping_add(0xa282_ead8);
    assert_eq!(masked_crc(b"123456789"), masked);
}

#[derive(Debug, PartialEq)]
enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn number(&self) -> u64 {
        match self {
            Field::Number(number) => *number,
            Field::Bytes(_) => panic!("{self:?} is no number"),
        }
    }

    fn bytes(&self) -> &'a [u8] {
        match self {
            Field::Number(_) => panic!("{self:?} is no message"),
            Field::Bytes(bytes) => bytes,
        }
    }
}

/// The fields of a protobuf message, by number.
fn fields(mut bytes: &[u8]) -> BTreeMap<u64, Vec<Field<'_>>> {
    let mut fields: BTreeMap<u64, Vec<Field>> = BTreeMap::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let field = match key & 7 {
            0 => Field::Number(varint(&mut bytes)),
            1 => Field::Number(u64::from_le_bytes(take(&mut bytes))),
            2 => {
                let length = usize::try_from(varint(&mut bytes)).unwrap();
                let (field, rest) = bytes.split_at(length);
                bytes = rest;
                Field::Bytes(field)
            }
            5 => Field::Number(u64::from(u32::from_le_bytes(take(&mut bytes)))),
            kind => panic!("wire type {kind}"),
        };
        fields.entry(key >> 3).or_default().push(field);
    }
    fields
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (taken, rest) = bytes.split_first_chunk::<N>().unwrap();
    *bytes = rest;
    *taken
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = take(bytes);
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}
