//! An adapter's `adapter_config.json` up to the first zero byte, its tensors behind it; the same bytes
//! as a prefix folder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::checkpoint::{LoraFiles, PrefixFiles};

mod scratch;

fuzz_target!(|bytes: &[u8]| {
    let end = bytes.iter().position(|&byte| byte == 0);
    let (config, tensors) = bytes.split_at(end.unwrap_or(bytes.len()));
    let tensors = tensors.get(1..).unwrap_or_default();
    scratch::write("adapter_config.json", config);
    scratch::write("adapter_model.safetensors", tensors);
    if let Ok(files) = LoraFiles::read(scratch::folder()) {
        files
            .write(&scratch::folder().join("again"))
            .expect("what is read can be written");
    }
    scratch::write("config.json", config);
    scratch::write("prefix.safetensors", tensors);
    let _ = PrefixFiles::read(scratch::folder());
});
