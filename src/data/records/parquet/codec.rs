//! Pages as they were before they were compressed. The compressors are Rust; memory follows what is
//! really there, not what a header promises.

use std::io::Read;

use flate2::read::MultiGzDecoder;
use parquet::basic::Compression;

/// Largest page that is read, in bytes: long documents make pages of some hundred megabytes.
pub(super) const MAX_PAGE: u64 = 256 << 20;

/// The `size` bytes that were compressed.
pub(super) fn decompress(
    compression: Compression,
    bytes: Vec<u8>,
    size: usize,
) -> Result<Vec<u8>, String> {
    let name = compression.to_string();
    let damaged = |message: String| format!("a page does not decompress ({name}: {message})");
    let page = match compression {
        Compression::UNCOMPRESSED => bytes,
        Compression::SNAPPY => {
            let promised = snap::raw::decompress_len(&bytes);
            match promised.map_err(|error| damaged(error.to_string()))? {
                promised if promised == size => snap::raw::Decoder::new()
                    .decompress_vec(&bytes)
                    .map_err(|error| damaged(error.to_string()))?,
                promised => {
                    return Err(damaged(format!("{promised} bytes where {size} belong")));
                }
            }
        }
        // A byte of this format stands for 255 at most.
        Compression::LZ4_RAW if size / 256 <= bytes.len() => {
            lz4_flex::block::decompress(&bytes, size).map_err(|error| damaged(error.to_string()))?
        }
        Compression::GZIP(_) => read(MultiGzDecoder::new(&bytes[..]), size).map_err(damaged)?,
        Compression::ZSTD(_) => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(&bytes[..]);
            let decoder = decoder.map_err(|error| damaged(error.to_string()))?;
            read(decoder, size).map_err(damaged)?
        }
        Compression::LZ4_RAW => return Err(damaged("more bytes than can be in it".to_owned())),
        other => {
            return Err(format!(
                "it is compressed with {other}; write it again with snappy, zstd, gzip or lz4_raw"
            ));
        }
    };
    match page.len() {
        found if found == size => Ok(page),
        found => Err(damaged(format!("{found} bytes where {size} belong"))),
    }
}

/// What a decompressor gives, and one byte more than it should if it goes on.
fn read(decoder: impl Read, size: usize) -> Result<Vec<u8>, String> {
    let mut page = Vec::new();
    let most = size as u64 + 1;
    let read = decoder.take(most).read_to_end(&mut page);
    read.map_err(|error| error.to_string())?;
    Ok(page)
}
