//! Folders of every generation: the tokenizer that is in them, and those that do not belong there.

use std::path::Path;

use mp_train::config::model::ModelConfig;
use mp_train::data::tokenizer::{
    ConfigIds, Era, EraWarning, Generation, GlmTokenizer, TokenizerFiles,
};
use serde_json::{Value, json};

fn stand_in(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer");
    std::fs::read(folder.join(name)).unwrap()
}

/// A model of ChatGLM-6B with the stand-in's ids, shifted.
fn chatglm(shift: u32) -> Value {
    json!({
        "model_type": "chatglm", "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2,
        "inner_hidden_size": 256, "layernorm_epsilon": 1e-5, "max_sequence_length": 128,
        "vocab_size": 2128 + shift, "mask_token_id": 1656 + shift, "gmask_token_id": 1657 + shift,
        "bos_token_id": 1660 + shift, "eos_token_id": 1661 + shift, "pad_token_id": 3 + shift
    })
}

/// A model in the layout of ChatGLM2, ChatGLM3 and the original GLM-4.
fn chatglm2(vocab_size: u32, eos: Value, pad: u32) -> Value {
    json!({
        "model_type": "chatglm", "hidden_size": 64, "num_attention_heads": 4, "num_layers": 2,
        "ffn_hidden_size": 172, "kv_channels": 16, "multi_query_attention": true,
        "multi_query_group_num": 2, "layernorm_epsilon": 1e-5, "seq_length": 128,
        "rmsnorm": true, "add_qkv_bias": true, "padded_vocab_size": vocab_size,
        "eos_token_id": eos, "pad_token_id": pad
    })
}

fn glm() -> Value {
    json!({
        "model_type": "glm", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 172,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 128, "vocab_size": 2064,
        "eos_token_id": [2000, 2007, 2009], "pad_token_id": 2000
    })
}

type Built = Result<(GlmTokenizer, Vec<EraWarning>), String>;

/// What is made of a folder with these files beside its config.json.
fn open(model: &Value, files: &[(&str, &[u8])]) -> Built {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), model.to_string()).unwrap();
    for (name, contents) in files {
        std::fs::write(folder.path().join(name), contents).unwrap();
    }
    let config = ModelConfig::from_json_file(&folder.path().join("config.json")).unwrap();
    let read = TokenizerFiles::read(folder.path());
    let built = read.and_then(|files| files.build(&ConfigIds::from(&config), None));
    built.map_err(|error| error.to_string())
}

fn generation(built: Built) -> (Generation, Vec<EraWarning>) {
    let (tokenizer, warnings) = built.unwrap();
    (tokenizer.generation(), warnings)
}

#[test]
fn every_generation_is_known_by_its_files() {
    let (one, base, two) = (
        stand_in("v1.model"),
        stand_in("v1_base.model"),
        stand_in("v2.model"),
    );
    let (ranks, json) = (
        stand_in("glm4/tokenizer.model"),
        stand_in("glm4/tokenizer.json"),
    );
    let slim: (&str, &[u8]) = ("tokenizer_config.json", br#"{"num_image_tokens": 0}"#);
    let code: (&str, &[u8]) = (
        "tokenization_chatglm.py",
        b"special_tokens = ['sop', 'eop']",
    );
    let glm4_ends = json!([2000, 2007, 2009]);
    for (model, files, expected) in [
        (
            chatglm(20_000),
            vec![("ice_text.model", &base[..])],
            Generation::ChatGlm(Era::A),
        ),
        (
            chatglm(20_000),
            vec![("ice_text.model", &one[..])],
            Generation::ChatGlm(Era::B),
        ),
        (
            chatglm(0),
            vec![("ice_text.model", &one[..]), slim],
            Generation::ChatGlm(Era::C),
        ),
        (
            chatglm2(2048, json!(2), 0),
            vec![("tokenizer.model", &two[..]), code],
            Generation::ChatGlm2,
        ),
        (
            chatglm2(2064, glm4_ends.clone(), 2000),
            vec![("tokenizer.model", &ranks[..])],
            Generation::Glm4,
        ),
        (glm(), vec![("tokenizer.json", &json[..])], Generation::Glm4),
        (
            glm(),
            vec![("tokenizer.model", &ranks[..])],
            Generation::Glm4,
        ),
    ] {
        assert_eq!(generation(open(&model, &files)), (expected, vec![]));
    }
}

#[test]
fn chatglm3_is_told_from_chatglm2_by_what_stands_beside_the_file() {
    let two = stand_in("v2.model");
    let with = |model: Value, name: &str, contents: &str| {
        let files = [("tokenizer.model", &two[..]), (name, contents.as_bytes())];
        generation(open(&model, &files))
    };
    let model = || chatglm2(2048, json!(2), 0);
    let named = |name: &str| {
        let mut model = model();
        model["_name_or_path"] = json!(name);
        model
    };
    let config = "tokenizer_config.json";
    let code = "tokenization_chatglm.py";
    let two_and_three = [Generation::ChatGlm2, Generation::ChatGlm3];
    for (model, name, contents, three) in [
        (
            model(),
            config,
            r#"{"name_or_path": "THUDM/chatglm3-6b"}"#,
            1,
        ),
        (
            model(),
            config,
            r#"{"name_or_path": "/models/ChatGLM2-6B"}"#,
            0,
        ),
        (
            model(),
            config,
            r#"{"added_tokens_decoder": {"2006": {"content": "<|user|>"}}}"#,
            1,
        ),
        (
            model(),
            config,
            r#"{"additional_special_tokens": ["<|user|>"]}"#,
            1,
        ),
        (
            model(),
            config,
            r#"{"chat_template": "{{ '<|user|>' }}"}"#,
            1,
        ),
        (model(), code, "role = '<|user|>'", 1),
        (model(), code, "mask = '[gMASK]'", 0),
        // The folder's own tokenizer_config.json counts more than where the model came from.
        (
            named("chatglm2-6b"),
            config,
            r#"{"name_or_path": "chatglm3-6b"}"#,
            1,
        ),
        (named("THUDM/chatglm3-6b-32k"), config, "{}", 1),
        (named("chatglm2-6b"), config, "{}", 0),
        (chatglm2(2048, json!([2, 2006, 2008]), 0), config, "{}", 1),
    ] {
        let found = with(model, name, contents);
        assert_eq!(found, (two_and_three[three], vec![]), "{name}: {contents}");
    }
    let (taken, warnings) = with(model(), config, "{}");
    assert_eq!(
        (taken, &warnings[..]),
        (Generation::ChatGlm2, &[EraWarning::TakenForChatGlm2][..])
    );
    assert!(warnings[0].to_string().contains("tokenizer_config.json"));
}

#[test]
fn the_tokenizer_of_another_model_is_refused() {
    let files = [
        ("ice_text.model", stand_in("v1.model"), "ChatGLM-6B"),
        (
            "tokenizer.model",
            stand_in("v2.model"),
            "ChatGLM2 or ChatGLM3",
        ),
        ("tokenizer.model", stand_in("glm4/tokenizer.model"), "GLM-4"),
        ("tokenizer.json", stand_in("glm4/tokenizer.json"), "GLM-4"),
    ];
    let models = [
        (chatglm(0), "ChatGLM-6B"),
        (chatglm2(65_024, json!(2), 0), "ChatGLM2 or ChatGLM3"),
        (chatglm2(151_552, json!(2), 0), "GLM-4"),
        (glm(), "GLM-4"),
    ];
    let mut refused = 0;
    for (file, contents, of_file) in &files {
        for (model, of_model) in models.iter().filter(|(_, name)| name != of_file) {
            let error = open(model, &[(file, contents)]).unwrap_err();
            let names = format!("is that of {of_file}, but config.json");
            assert!(error.contains(&names), "{error}");
            assert!(error.contains(&format!("a model of {of_model}")), "{error}");
            refused += 1;
        }
    }
    assert_eq!(refused, 10);
    // Where sizes are nobody's, the ids that end an answer tell.
    let error =
        |model: Value, name: &str, contents: &[u8]| open(&model, &[(name, contents)]).unwrap_err();
    let wrong_end = error(
        chatglm2(2048, json!(2), 0),
        "tokenizer.model",
        &stand_in("glm4/tokenizer.model"),
    );
    assert!(
        wrong_end.contains("eos_token_id 2, but the tokenizer's <|endoftext|> is 2000"),
        "{wrong_end}"
    );
    let wrong_end = error(
        chatglm2(2064, json!([2000, 2007, 2009]), 2000),
        "tokenizer.model",
        &stand_in("v2.model"),
    );
    assert!(
        wrong_end.contains("eos_token_id 2000, but the tokenizer's </s> is 2"),
        "{wrong_end}"
    );
    let small = error(
        chatglm2(1000, json!(2), 0),
        "tokenizer.model",
        &stand_in("v2.model"),
    );
    assert!(
        small.contains("2005 ids, but the model only 1000"),
        "{small}"
    );
}
