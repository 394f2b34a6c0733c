//! The pickle alone, in a zip archive that is right around it: mutations of a whole file rarely get
//! past its checksums.
#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::checkpoint::{open_tensor_file, read_all};

mod scratch;
#[path = "../../checkpoint/torch_bytes.rs"]
#[allow(dead_code)]
mod torch_bytes;

fuzz_target!(|pickle: &[u8]| {
    let storage = [0x3c; 512];
    let bytes = torch_bytes::zip_of(&[
        ("model/data.pkl", pickle),
        ("model/data/0", &storage),
        ("model/data/1", &storage[..64]),
        ("model/version", b"3\n"),
    ]);
    let path = scratch::write("pytorch_model.bin", &bytes);
    if let Ok(file) = open_tensor_file(&path) {
        let _ = read_all(file.as_ref());
    }
    // The same in the older stream, as its fourth pickle.
    let stream = torch_bytes::legacy(&torch_bytes::Pickled {
        pickle: pickle.to_vec(),
        storage: storage.to_vec(),
    });
    let path = scratch::write("stream.bin", &stream);
    if let Ok(file) = open_tensor_file(&path) {
        let _ = read_all(file.as_ref());
    }
});
