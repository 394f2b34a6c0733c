//! What cannot be asked, and what is said about it.

use std::fs;

use serde_json::{Value, json};

use super::setup::{Setup, golden};

#[test]
fn rows_that_cannot_be_asked_are_named_by_file_and_line() {
    let setup = Setup::with(200, |config| config["max_sequence_length"] = json!(40));
    let output = setup.folder.path().join("answers.jsonl");
    let good = json!({ "prompt": "hi" });
    for (bad, words) in [
        (json!({ "prompt": "" }), "column prompt is empty"),
        (json!({ "prompt": ["a"] }), "column prompt holds a list"),
        (json!({ "question": "a" }), "no column prompt, instruction"),
        (
            json!({ "prompt": "a", "history": [["b"]] }),
            "column history is no list of",
        ),
        (json!({ "prompt": "a".repeat(50) }), "max_sequence_length"),
        (json!({ "input_ids": [5, 6] }), "sop"),
        (json!({ "input_ids": [200] }), "vocab_size"),
        (json!({ "input_ids": "5" }), "invalid type"),
        (json!(["a"]), "invalid type"),
    ] {
        let rows = [good.clone(), bad.clone()];
        let ended = setup.generate(&rows, &["--output", output.to_str().unwrap()]);
        ended.is_refused(&["rows.jsonl:2: ", words]);
        assert!(!output.exists() && ended.stdout.is_empty(), "{bad}");
    }
}

#[test]
fn text_without_a_tokenizer_is_refused_and_ids_are_not() {
    let setup = Setup::new();
    let by_ids = json!({ "input_ids": setup.prompt_ids("hi") });
    fs::remove_file(setup.model.join("ice_text.model")).unwrap();
    let rows = [by_ids.clone(), json!({ "prompt": "hi" })];
    let told = [
        "rows.jsonl:2: text, but ",
        "has no tokenizer: put",
        "ice_text.model",
        "input_ids",
    ];
    setup.generate(&rows, &[]).is_refused(&told);
    assert_eq!(
        setup.answers(&[by_ids], &["--max-new-tokens", "2"]).len(),
        1
    );
    let told = ["no ice_text.model, tokenizer.model or tokenizer.json is there"];
    setup.chat("hi\n", &[]).is_refused(&told);
}

#[test]
fn a_tokenizer_of_another_model_is_refused() {
    let setup = Setup::new();
    let other = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokenizer/v1.model");
    fs::copy(other, setup.model.join("ice_text.model")).unwrap();
    let told = [
        "the tokenizer makes ids up to 1999",
        "the model has only 200",
    ];
    setup
        .generate(&[json!({ "prompt": "hi" })], &[])
        .is_refused(&told);
    setup.chat("hi\n", &[]).is_refused(&told);
    fs::write(setup.model.join("ice_text.model"), b"\x0a\xff\xff").unwrap();
    setup.chat("hi\n", &[]).is_refused(&["ice_text.model"]);
}

#[test]
fn settings_that_mean_nothing_are_refused_before_anything_is_read() {
    let setup = Setup::new();
    for (flags, words) in [
        (["--temperature", "-1"], "--temperature -1: must be 0"),
        (["--temperature", "nan"], "--temperature NaN: must be 0"),
        (["--top-p", "1.5"], "--top-p 1.5: must be from 0 to 1"),
        (
            ["--repetition-penalty", "0"],
            "--repetition-penalty 0: must be more than 0",
        ),
        (["--top-k", "-1"], "--top-k"),
        (["--seed", "x"], "--seed"),
        (["--template", "alpacca"], "'alpaca'"),
        (
            ["--balance", "1,3"],
            "--balance has 2 numbers for 1 devices",
        ),
        (["--max-new-tokens", "0"], "0 is not in 1..=65536"),
    ] {
        setup
            .generate(&[json!({ "prompt": "hi" })], &flags)
            .is_refused(&[words]);
        setup.chat("hi\n", &flags).is_refused(&[words]);
    }
    let told = [
        "--max-new-tokens 2048 leaves no room for a question",
        "2048 tokens",
    ];
    setup
        .chat("hi\n", &["--max-new-tokens", "2048"])
        .is_refused(&told);
}

#[test]
fn a_chats_bad_lines_are_named() {
    let setup = Setup::with(200, |config| config["max_sequence_length"] = json!(40));
    let flags = ["--max-new-tokens", "8"];
    let ended = setup.chat(&format!("hi\n{}\n", "a".repeat(40)), &flags);
    ended.is_refused(&["standard input:2: the question has 43 tokens; the model takes 32"]);
    assert!(ended.stdout.ends_with('\n'), "the first was answered");
    let path = setup.folder.path().join("latin1.txt");
    fs::write(&path, b"hi\n\xe9\n").unwrap();
    let mut command = setup.command("chat");
    let output = command
        .args(flags)
        .stdin(fs::File::open(&path).unwrap())
        .output()
        .unwrap();
    super::setup::ended(output).is_refused(&["standard input:2: not UTF-8"]);
}

#[test]
fn damaged_templates_and_adapters_are_named() {
    let setup = Setup::new();
    let rows = [json!({ "prompt": "hi" })];
    let adapter = setup.adapter("adapter_lora_qkv", Some("[template]\nkind = \"alpacca\"\n"));
    let flags = ["--adapter", adapter.to_str().unwrap()];
    let told = ["template.toml: not a template: line 2", "alpacca"];
    setup.generate(&rows, &flags).is_refused(&told);
    setup.chat("hi\n", &flags).is_refused(&told);
    let absent = golden("absent");
    let flags = ["--adapter", absent.to_str().unwrap()];
    setup.generate(&rows, &flags).is_refused(&["absent"]);
    setup.chat("hi\n", &flags).is_refused(&["absent"]);
}

#[test]
fn weights_that_are_no_numbers_are_told_where_a_token_is_chosen() {
    let setup = Setup::new();
    setup.spoil_the_head();
    let rows: [Value; 1] = [json!({ "prompt": "hi" })];
    let told = [
        "token 1 of the answer",
        "1 of the 200 logits are not finite",
        "NaN, of id 0",
    ];
    setup.generate(&rows, &[]).is_refused(&told);
    setup.chat("hi\n", &[]).is_refused(&told);
}
