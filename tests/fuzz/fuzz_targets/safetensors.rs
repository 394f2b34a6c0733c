#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::checkpoint::{open_tensor_file, read_all};

mod scratch;

fuzz_target!(|bytes: &[u8]| {
    let path = scratch::write("model.safetensors", bytes);
    if let Ok(file) = open_tensor_file(&path) {
        read_all(file.as_ref()).expect("what was checked against the file can be read");
    }
});
