//! `mp-train check`: a run that would go through, and worlds in which everything is wrong at once.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use serde_json::{Value, json};

#[path = "text_run/model.rs"]
mod model;
#[allow(dead_code, reason = "what other tests of the program need beside")]
#[path = "run/program.rs"]
mod program;
#[allow(dead_code, reason = "the refusals need more of it")]
#[path = "refusals/world.rs"]
mod world;

use program::{Ended, mp_train, run, succeed};
use world::World;

const IDS: &str =
    "--model model --train rows.jsonl --output output --max-steps 2 --threads 1 --devices cpu";
const TEXT: &str = "--model text_model --train alpaca.jsonl --output output --max-steps 2 --threads 1 \
                    --devices cpu --max-source-length 64 --max-target-length 64";

fn check(world: &World, flags: &str) -> Command {
    let mut command = mp_train(["check"]);
    command
        .args(flags.split_whitespace())
        .current_dir(world.path());
    command
}

/// Everything that is said of a run that would not go through.
#[track_caller]
fn refused(world: &World, flags: &str, words: &[&str]) -> Ended {
    let ended = run(&mut check(world, flags));
    assert_eq!(ended.code, Some(2), "{}{}", ended.stdout, ended.stderr);
    for word in words {
        assert!(
            ended.stdout.contains(word),
            "no {word:?} in\n{}{}",
            ended.stdout,
            ended.stderr
        );
    }
    let told = "the run would not go through";
    assert!(ended.stderr.contains(told), "{}", ended.stderr);
    ended
}

#[test]
fn a_run_that_would_go_through_is_said_to() {
    let world = World::new();
    let ended = succeed(&mut check(&world, IDS));
    for word in [
        "4 blocks of 64, vocabulary 200",
        "2 of 5 to 7 tokens",
        "cpu for 2 steps",
        "nothing found that would stop the run\n",
    ] {
        assert!(
            ended.stdout.contains(word),
            "no {word:?} in\n{}",
            ended.stdout
        );
    }
    let ended = succeed(&mut check(&world, TEXT));
    assert!(
        ended.stdout.contains("ChatGLM-6B, 760 ids"),
        "{}",
        ended.stdout
    );
    // What was said holds.
    let mut train = mp_train(TEXT.split_whitespace());
    succeed(train.current_dir(world.path()));
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let world = World::new();
    // Three tensors: one misshapen, one of integers, one missing; and one that nobody knows.
    let path = world.path().join("text_model/model.safetensors");
    let mut tensors = read_all(open_tensor_file(&path).unwrap().as_ref()).unwrap();
    let (bias, integers) = (
        "transformer.final_layernorm.bias",
        "transformer.layers.1.attention.dense.bias",
    );
    tensors.insert(
        bias.to_owned(),
        HostTensor::from_f32([65], &[0.0; 65]).unwrap(),
    );
    let shape = tensors[integers].shape.clone();
    let bytes = vec![0; 8 * shape[0]];
    let of_integers = HostTensor::new(mp_train::checkpoint::Dtype::I64, shape, bytes).unwrap();
    tensors.insert(integers.to_owned(), of_integers);
    tensors
        .remove("transformer.layers.2.input_layernorm.weight")
        .unwrap();
    tensors.insert(
        "visual.proj".to_owned(),
        HostTensor::from_f32([1], &[0.0]).unwrap(),
    );
    write_safetensors(&path, &tensors).unwrap();
    // Rows: two without an answer, one that is no JSON, one twice.
    let row = |question: &str, answer: &str| {
        format!(
            "{}\n",
            json!({ "instruction": question, "input": "", "output": answer })
        )
    };
    let rows = [
        row("Who are you?", "A small model."),
        row("Who is there?", ""),
        "{\"instruction\": \"half\n".to_owned(),
        row("Name a colour.", "Blue."),
        row("Who are you?", "A small model."),
        row("Nobody?", ""),
    ];
    world.write("alpaca.jsonl", rows.concat());
    // A layer that the model does not have, an output folder below a file.
    world.write("file", "");
    let elsewhere = TEXT.replace("--output output", "--output file/output");
    let flags = format!("{elsewhere} --target-modules q_proj");
    let ended = refused(
        &world,
        &flags,
        &[
            "problem: model: 2 tensors are not what config.json says",
            bias,
            integers,
            "1 tensors of the model are missing, the first is `transformer.layers.2.input_layernorm.weight`",
            "visual.proj",
            "problem: adapter: target_modules",
            "problem: rows: 3 rows cannot be used",
            "alpaca.jsonl:2",
            "alpaca.jsonl:3",
            "warning: rows: 1 rows are there more than once",
            "row 3 is row 1 again",
            "problem: output: file/output/cache/",
            "problem: output: file is not a folder",
        ],
    );
    assert!(
        ended.stderr.contains("7 problems"),
        "{}{}",
        ended.stdout,
        ended.stderr
    );
    assert!(ended.stderr.contains("1 warning"), "{}", ended.stderr);
}

#[test]
fn without_model_or_tokenizer_the_form_of_rows_is_still_looked_at() {
    let world = World::new();
    world.write(
        "alpaca.jsonl",
        "{\"instruction\": \"a\", \"output\": \"b\"}\n{\"text\": 1}\n",
    );
    fs::remove_file(world.path().join("text_model/ice_text.model")).unwrap();
    let words = [
        "there is no tokenizer",
        "1 rows of text have the template's form",
        "1 rows cannot be used",
        "alpaca.jsonl:2",
    ];
    refused(&world, TEXT, &words);
    world.write("text_model/config.json", "{");
    let words = [
        "problem: model: text_model/config.json",
        "1 rows cannot be used",
    ];
    refused(&world, TEXT, &words);
}

#[test]
fn a_tokenizer_of_another_model_is_a_problem() {
    let world = World::new();
    world.stored("tokenizer/v1.model", "text_model/ice_text.model");
    refused(&world, TEXT, &["problem: tokenizer: "]);
}

#[test]
fn rows_for_validation_that_are_trained_on_are_a_warning() {
    let world = World::new();
    let flags = format!("{TEXT} --validation alpaca.jsonl");
    let ended = succeed(&mut check(&world, &flags));
    for word in [
        "warning: validation rows: 2 validation rows are trained on too",
        "validation row 2 is training row 2",
        "nothing found that would stop the run, and 1 warning",
    ] {
        assert!(
            ended.stdout.contains(word),
            "no {word:?} in\n{}",
            ended.stdout
        );
    }
}

#[test]
fn memory_and_checkpoints_are_looked_at() {
    let world = World::new();
    let flags = format!("{IDS} --memory-per-device 1MiB");
    refused(
        &world,
        &flags,
        &["problem: devices: stage 0 on device cpu needs"],
    );
    refused(&world, &format!("{IDS} --resume"), &["problem: output: "]);
    let mut train = mp_train(IDS.split_whitespace());
    succeed(train.current_dir(world.path()));
    let ended = succeed(&mut check(&world, &format!("{IDS} --resume")));
    assert!(
        ended.stdout.contains("goes on from step 2"),
        "{}",
        ended.stdout
    );
    // Other rows are another run.
    world.write("rows.jsonl", world::ROWS.replace("[5, 6,", "[6, 6,"));
    refused(&world, &format!("{IDS} --resume"), &["problem: output: "]);
}

#[test]
fn findings_can_be_had_as_json() {
    let world = World::new();
    let ended = run(&mut check(
        &world,
        &format!("{IDS} --target-modules nothing --json"),
    ));
    assert_eq!(ended.code, Some(2));
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let finding = &report["findings"][0];
    assert_eq!(finding["severity"], "problem");
    assert_eq!(finding["about"], "adapter");
    assert_eq!(finding["count"], 1);
    assert!(finding["message"].as_str().unwrap().contains("nothing"));
    assert_eq!(report["facts"][0]["about"], "model");
}
