//! What cannot be evaluated, and what is said about it.

use std::fs;

use serde_json::{Value, json};

use super::answers::evaluate;
use super::setup::Setup;

#[test]
fn rows_that_cannot_be_evaluated_are_named() {
    let setup = Setup::new();
    let output = setup.folder.path().join("predictions.jsonl");
    let flags = ["--predictions", output.to_str().unwrap()];
    let good = json!({ "prompt": "a", "response": "b" });
    for (bad, words) in [
        (json!({ "prompt": "a" }), "response"),
        (json!({ "prompt": "a", "response": "" }), "response"),
        (json!({ "prompt": "", "response": "a" }), "prompt"),
    ] {
        let data = setup.rows("rows.jsonl", &[good.clone(), bad.clone()]);
        let told = evaluate(&setup, &data, &flags);
        told.is_refused(&["rows.jsonl:2: ", words, "--bad-rows skip"]);
        assert!(!output.exists() && told.stdout.is_empty(), "{bad}");
        let skipped = ["--bad-rows", "skip", "--max-new-tokens", "1"];
        let ended = evaluate(&setup, &data, &skipped);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.stderr.contains("warning: 1 rows are left out"));
        assert!(ended.stdout.starts_with("1 rows, "), "{}", ended.stdout);
    }
    let unlabelled = json!({ "input_ids": [5, 191, 194, 7], "labels": [-100, -100, -100, -100] });
    let data = setup.rows("rows.jsonl", &[unlabelled]);
    evaluate(&setup, &data, &flags).is_refused(&["rows.jsonl:1: no target"]);
}

#[test]
fn files_without_rows_and_files_that_are_not_there_are_named() {
    let setup = Setup::new();
    let data = setup.rows("nothing.jsonl", &[]);
    evaluate(&setup, &data, &[]).is_refused(&["nothing.jsonl", "no row"]);
    let absent = setup.folder.path().join("absent.jsonl");
    evaluate(&setup, &absent, &[]).is_refused(&["absent.jsonl"]);
    let mut command = setup.command("eval");
    super::setup::ended(command.output().unwrap()).is_refused(&["--data"]);
}

#[test]
fn answers_need_a_tokenizer_and_a_question() {
    let setup = Setup::new();
    let text = setup.rows("text.jsonl", &[json!({ "content": "a story" })]);
    let plain = ["--template", "plain_text"];
    evaluate(&setup, &text, &plain).is_refused(&["plain_text", "--loss-only"]);
    let alone = [&plain[..], &["--loss-only"]].concat();
    assert_eq!(evaluate(&setup, &text, &alone).code, Some(0));
    let row = json!({ "input_ids": [5, 191, 194, 7], "labels": [-100, -100, -100, 7] });
    let ids = setup.rows("ids.jsonl", &[row]);
    assert_eq!(
        evaluate(&setup, &ids, &["--max-new-tokens", "1"]).code,
        Some(0)
    );
    fs::remove_file(setup.model.join("ice_text.model")).unwrap();
    evaluate(&setup, &ids, &[]).is_refused(&["has no tokenizer", "--loss-only"]);
    assert_eq!(evaluate(&setup, &ids, &["--loss-only"]).code, Some(0));
    evaluate(&setup, &text, &[]).is_refused(&["text.jsonl"]);
}

#[test]
fn files_that_cannot_be_written_are_told_before_anything_is_read() {
    let setup = Setup::new();
    let absent = setup.folder.path().join("absent.jsonl");
    for flag in ["--predictions", "--output"] {
        let nowhere = setup.folder.path().join("nowhere/file");
        let told = evaluate(&setup, &absent, &[flag, nowhere.to_str().unwrap()]);
        told.is_refused(&["cannot write", "nowhere/file"]);
    }
    let both = ["--predictions", "-", "--output", "-"];
    evaluate(&setup, &absent, &both).is_refused(&["cannot both go to standard output"]);
    let told = evaluate(&setup, &absent, &["--temperature", "-1"]);
    told.is_refused(&["--temperature -1: must be 0"]);
}

#[test]
fn weights_that_are_no_numbers_are_told_with_their_rows() {
    let setup = Setup::new();
    setup.spoil_the_head();
    let rows: Vec<Value> = vec![json!({ "prompt": "a", "response": "b" }); 3];
    let data = setup.rows("rows.jsonl", &rows);
    let told = ["the loss of rows 1 to 3 is NaN"];
    evaluate(&setup, &data, &[]).is_refused(&told);
}
