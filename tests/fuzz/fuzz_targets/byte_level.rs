//! GLM-4's vocabulary: a `tokenizer.json` or tiktoken's list of ranks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::data::byte_level::{ByteLevel, Tokens, is_ranks};

fuzz_target!(|bytes: &[u8]| {
    let tokens = match is_ranks(bytes) {
        true => Tokens::from_ranks(bytes),
        false => Tokens::from_tokenizer_json(bytes),
    };
    let Ok(model) = tokens.and_then(ByteLevel::new) else {
        return;
    };
    for text in ["", " ", "hello  world\n\t你好，世界 ﷺ \u{1f600}", "it's 12345\r\n"] {
        let ids = model.encode(text);
        assert_eq!(model.decode(&ids), text.as_bytes());
    }
});
