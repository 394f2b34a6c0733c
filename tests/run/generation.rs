//! `mp-train generate`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::family::{Case, family};
use super::layout::Layout;
use super::program::{fail, mp_train, succeed};
use super::setup::Setup;

/// The prompts of the golden case without their padding on the left, as JSONL.
fn prompts(case: &Case) -> String {
    let length = case.shape("input_ids")[1];
    let (ids, real) = (case.i64("input_ids"), case.i64("non_pad"));
    let mut text = String::new();
    for (ids, real) in ids.chunks(length).zip(real.chunks(length)) {
        let ids = ids.iter().zip(real).filter(|&(_, &real)| real == 1);
        let ids: Vec<i64> = ids.map(|(&id, _)| id).collect();
        text.push_str(&format!("{}\n", json!({ "input_ids": ids })));
    }
    text
}

fn generate(model: &Path, prompts: &Path, stages: usize, new_tokens: usize) -> Command {
    let mut command = mp_train(["generate", "--no-stop-at-eop", "--model"]);
    command
        .arg(model)
        .arg("--input")
        .arg(prompts)
        .args(["--max-new-tokens", &new_tokens.to_string()])
        .args(["--devices", &vec!["cpu"; stages].join(",")])
        .args(["--threads", &(stages % 3 + 1).to_string()]);
    command
}

/// The new tokens of every answer.
fn answers(text: &str) -> Vec<Vec<i64>> {
    let answer = |line: &str| {
        let row: Value = serde_json::from_str(line).unwrap();
        let ids = row["new_tokens"].as_array().unwrap();
        ids.iter().map(|id| id.as_i64().unwrap()).collect()
    };
    text.lines().map(answer).collect()
}

fn written_prompts(folder: &Path) -> (Case, PathBuf) {
    let case = family().case("generate_greedy");
    let path = folder.join("prompts.jsonl");
    fs::write(&path, prompts(&case)).unwrap();
    (case, path)
}

#[test]
fn greedy_answers_are_the_references_on_any_number_of_stages() {
    let folder = tempfile::tempdir().unwrap();
    let (case, prompts) = written_prompts(folder.path());
    let tensors = case.tensors.keys();
    let kinds: Vec<&str> = tensors
        .filter_map(|name| name.strip_suffix(".new_tokens"))
        .collect();
    assert!(kinds.contains(&"plain") && kinds.len() >= 3, "{kinds:?}");
    for kind in kinds {
        let name = format!("{kind}.new_tokens");
        let [_, new_tokens] = *case.shape(&name) else {
            panic!("{name} is not two-dimensional");
        };
        let expected: Vec<Vec<i64>> = case.i64(&name).chunks(new_tokens).map(Vec::from).collect();
        for stages in 1..=family().most_stages() {
            let model = family().path("model");
            let mut command = generate(&model, &prompts, stages, new_tokens);
            if kind != "plain" {
                let adapter = family().path(&format!("{kind}_checkpoint"));
                command.arg("--adapter").arg(adapter);
            }
            let found = answers(&succeed(&mut command).stdout);
            assert_eq!(found, expected, "{kind} on {stages} stages");
        }
    }
}

#[test]
fn an_adapter_that_was_just_trained_answers_on_any_number_of_stages() {
    let base = {
        let folder = tempfile::tempdir().unwrap();
        let (_, prompts) = written_prompts(folder.path());
        succeed(&mut generate(&family().path("model"), &prompts, 1, 8)).stdout
    };
    for name in [
        "lora_train",
        "ptuning_projection_train",
        "full_finetune_train",
    ] {
        let setup = Setup::golden(name);
        let (_, prompts) = written_prompts(setup.folder.path());
        let output = setup.output("run");
        succeed(&mut setup.command(Layout::new(2, "1f1b", "none", 2), &output));
        let (model, adapter) = match name {
            "full_finetune_train" => (output.join("model"), None),
            _ => (setup.model.clone(), Some(output.join("adapter"))),
        };
        let mut first: Option<Vec<Vec<i64>>> = None;
        for stages in 1..=family().most_stages() {
            let to = setup.folder.path().join(format!("{stages}.jsonl"));
            let mut command = generate(&model, &prompts, stages, 8);
            command.arg("--output").arg(&to);
            if let Some(adapter) = &adapter {
                command.arg("--adapter").arg(adapter);
            }
            succeed(&mut command);
            let found = answers(&fs::read_to_string(&to).unwrap());
            assert_ne!(found, answers(&base), "{name} has changed nothing");
            assert_eq!(*first.get_or_insert(found.clone()), found, "{name}");
        }
    }
}

#[test]
fn a_prompt_that_cannot_be_is_named_by_its_line_and_no_output_appears() {
    let folder = tempfile::tempdir().unwrap();
    let (_, path) = written_prompts(folder.path());
    let good = fs::read_to_string(&path).unwrap();
    let lines = good.lines().count();
    let output = folder.path().join("answers.jsonl");
    let vocabulary = family().number("vocab_size");
    for (bad, words) in [
        (format!("{{\"input_ids\": [{vocabulary}]}}"), "vocab"),
        ("{\"input_ids\": [5, 6, 7]}".to_owned(), "sop"),
        ("{\"input_ids\": []}".to_owned(), "empty"),
        ("{\"input_ids\": [5".to_owned(), "EOF"),
    ] {
        fs::write(&path, format!("{good}{bad}\n")).unwrap();
        let mut command = generate(&family().path("model"), &path, 1, 2);
        command.arg("--output").arg(&output);
        let text = fail(&mut command, 2, &[words]);
        let place = (lines + 1).to_string();
        assert!(text.contains(&place), "{text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{bad}");
    }
}
