//! TensorBoard event files: scalars by step, for `tensorboard --logdir <output>`.
//!
//! A file is a list of TFRecords (length, its masked CRC-32C, the bytes, their masked CRC-32C), each an
//! `Event` message of TensorFlow's event.proto, of which only wall_time (1), step (2), file_version (3)
//! and summary (5) with tag (1) and simple_value (2) are needed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Why scalars could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}", path = path.display())]
pub struct TensorBoardError {
    path: PathBuf,
    source: io::Error,
}

/// The open event file of a run. A resumed run opens another beside it; TensorBoard shows both as one.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    path: PathBuf,
}

impl EventFile {
    /// Starts an event file in the folder `output`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(output: &Path) -> Result<Self, TensorBoardError> {
        let now = seconds();
        let name = format!(
            "events.out.tfevents.{:010}.mp-train.{}",
            now as u64,
            std::process::id()
        );
        let path = output.join(name);
        let open = || {
            let file = OpenOptions::new().create(true).append(true).open(&path)?;
            let mut version = Vec::new();
            double(&mut version, 1, now);
            bytes(&mut version, 3, b"brain.Event:2");
            (&file).write_all(&record(&version))?;
            Ok(file)
        };
        match open() {
            Ok(file) => Ok(EventFile { file, path }),
            Err(source) => Err(TensorBoardError { path, source }),
        }
    }

    /// Adds scalars of one step, in one write.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f32)]) -> Result<(), TensorBoardError> {
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut entry = Vec::new();
            bytes(&mut entry, 1, tag.as_bytes());
            entry.push(2 << 3 | 5);
            entry.extend(value.to_le_bytes());
            bytes(&mut summary, 1, &entry);
        }
        let mut event = Vec::new();
        double(&mut event, 1, seconds());
        event.push(2 << 3);
        varint(&mut event, step);
        bytes(&mut event, 5, &summary);
        (&self.file)
            .write_all(&record(&event))
            .map_err(|source| TensorBoardError {
                path: self.path.clone(),
                source,
            })
    }
}

/// Seconds since 1970; 0 on a clock that stands before.
fn seconds() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0.0, |now| now.as_secs_f64())
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend(value);
}

fn double(out: &mut Vec<u8>, field: u8, value: f64) {
    out.push(field << 3 | 1);
    out.extend(value.to_le_bytes());
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let mut record = length.to_vec();
    record.extend(masked_crc32c(&length).to_le_bytes());
    record.extend(event);
    record.extend(masked_crc32c(event).to_le_bytes());
    record
}

/// CRC-32C bit by bit: records are some hundred bytes, once a step.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            let low = crc & 1;
            crc >>= 1;
            if low == 1 {
                crc ^= 0x82F6_3B78;
            }
        }
    }
    !crc
}

/// The form in which TFRecord stores a checksum.
fn masked_crc32c(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xA282_EAD8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_the_published_ones() {
        // RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn records_frame_their_events() {
        let record = record(b"abc");
        assert_eq!(record.len(), 8 + 4 + 3 + 4);
        assert_eq!(record[..8], 3u64.to_le_bytes());
        assert_eq!(&record[12..15], b"abc");
        let mut out = Vec::new();
        varint(&mut out, 300);
        assert_eq!(out, [0xAC, 0x02]);
    }
}
