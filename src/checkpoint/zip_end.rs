//! How many entries the end of a zip archive claims, looked at before the `zip` crate makes room for
//! them: it believes any number for which the file would be large enough, and a model's file is.
//!
//! An archive ends in a record (`PK\5\6`), which may point to one with 64-bit numbers (`PK\6\6`) through
//! a locator (`PK\6\7`) in front of it. Which one a reader takes when there are several is its own
//! affair, so every one that it could find is looked at.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const END: &[u8] = b"PK\x05\x06";
const LOCATOR: &[u8] = b"PK\x06\x07";
const END_64: &[u8] = b"PK\x06\x06";

/// Bytes of the last record, without the comment behind it.
const END_BYTES: usize = 22;
/// The most bytes of the comment.
const MAX_COMMENT: usize = 1 << 16;
const LOCATOR_BYTES: usize = 20;
/// Where the number of entries stands in a 64-bit record.
const COUNT_64: usize = 32;
/// The most bytes from a 64-bit record to its locator; torch writes 56.
const MAX_END_64: u64 = 4096;

/// Refuses an archive of which any record claims more than `most` entries.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(file: &File, size: u64, most: u64) -> Result<(), String> {
    let read = |start: u64, len: usize| {
        let mut bytes = vec![0; len];
        let read = file.read_exact_at(&mut bytes, start);
        read.map(|()| bytes)
            .map_err(|cause: io::Error| cause.to_string())
    };
    let reach = (LOCATOR_BYTES + END_BYTES + MAX_COMMENT) as u64;
    let start = size.saturating_sub(reach);
    let tail = read(start, (size - start) as usize)?;
    let mut ends = 0;
    for end in places(&tail, END) {
        ends += 1;
        let Some(locator) = end
            .checked_sub(LOCATOR_BYTES)
            .map(|at| &tail[at..end])
            .filter(|locator| locator.starts_with(LOCATOR))
        else {
            continue;
        };
        let locator_at = start + (end - LOCATOR_BYTES) as u64;
        let from = number(&locator[8..]).min(locator_at);
        if locator_at - from > MAX_END_64 {
            return Err(
                "its end is further from its list of entries than torch.save puts it".into(),
            );
        }
        let record = read(from, (locator_at - from) as usize)?;
        for at in places(&record, END_64) {
            let count = record.get(at + COUNT_64..).map_or(0, number);
            if count > most {
                return Err(format!("it claims to be an archive of {count} entries"));
            }
        }
    }
    match ends {
        0 => Err("the end of the archive is missing: it was cut short".to_owned()),
        _ => Ok(()),
    }
}

fn places<'a>(bytes: &'a [u8], mark: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let windows = bytes.windows(mark.len()).enumerate();
    windows.filter_map(move |(at, window)| (window == mark).then_some(at))
}

/// The eight bytes in front, or fewer where the file ends.
fn number(bytes: &[u8]) -> u64 {
    let mut number = [0; 8];
    let len = bytes.len().min(8);
    number[..len].copy_from_slice(&bytes[..len]);
    u64::from_le_bytes(number)
}
