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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    /// Text in every compression, and so many zeros.
    fn packed(text: &[u8]) -> [(Compression, Vec<u8>); 4] {
        let mut gzip = GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(text).unwrap();
        let mut snappy = snap::raw::Encoder::new();
        [
            (Compression::UNCOMPRESSED, text.to_vec()),
            (Compression::SNAPPY, snappy.compress_vec(text).unwrap()),
            (
                Compression::GZIP(Default::default()),
                gzip.finish().unwrap(),
            ),
            (
                Compression::ZSTD(Default::default()),
                compress_to_vec(text, CompressionLevel::Fastest),
            ),
        ]
    }

    #[test]
    fn pages_come_back_in_their_size_only() {
        let text = b"some text, some text, some text".repeat(50);
        for (compression, bytes) in packed(&text) {
            let size = text.len();
            assert_eq!(decompress(compression, bytes.clone(), size).unwrap(), text);
            for wrong in [0, size - 1, size + 1, MAX_PAGE as usize] {
                let error = decompress(compression, bytes.clone(), wrong).unwrap_err();
                assert!(
                    error.contains("does not decompress"),
                    "{compression}: {error}"
                );
            }
            if compression != Compression::UNCOMPRESSED {
                let half = bytes[..bytes.len() / 2].to_vec();
                assert!(
                    decompress(compression, half, size).is_err(),
                    "{compression}"
                );
                let error = decompress(compression, vec![0xff; 40], size).unwrap_err();
                assert!(
                    error.contains("does not decompress"),
                    "{compression}: {error}"
                );
            }
        }
    }

    #[test]
    fn what_goes_on_behind_its_size_is_not_followed() {
        let zeros = vec![0; 40 << 20];
        for (compression, bytes) in &packed(&zeros)[1..] {
            assert!(bytes.len() < 4 << 20, "{compression}");
            let error = decompress(*compression, bytes.clone(), 100).unwrap_err();
            let told = error.contains("101 bytes where 100") || error.contains("where 100 belong");
            assert!(told, "{compression}: {error}");
        }
        // Four bytes cannot hold so much.
        let error = decompress(Compression::LZ4_RAW, vec![0; 4], 1 << 20).unwrap_err();
        assert!(error.contains("more bytes than can be in it"), "{error}");
        let error = decompress(Compression::LZO, vec![0; 4], 4).unwrap_err();
        assert!(error.contains("write it again with snappy"), "{error}");
    }
}
