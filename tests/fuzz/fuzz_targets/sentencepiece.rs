#![no_main]

use libfuzzer_sys::fuzz_target;
use readers::data::sentencepiece::{ModelProto, SentencePiece};

fuzz_target!(|bytes: &[u8]| {
    let Ok(proto) = ModelProto::parse(bytes) else {
        return;
    };
    let again = ModelProto::parse(&proto.to_bytes()).expect("what was written can be read");
    assert_eq!(proto.pieces, again.pieces);
    let Ok(model) = SentencePiece::new(proto) else {
        return;
    };
    for text in ["", " ", "hello  world\n\t你好，世界 ﷺ \u{1f600}", "a\u{0}b\u{2581}<n>1234"] {
        let ids = model.encode(text);
        model.decode(&ids).expect("ids of the model");
    }
});
