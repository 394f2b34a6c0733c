//! Loss and perplexity against the golden runs and against training.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mp_train::checkpoint::{open_tensor_file, read_all};
use serde_json::{Value, json};

use super::answers::evaluate;
use super::setup::{Ended, Setup, ended};

/// A file of the golden data of a family.
fn golden(family: &str, rest: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(family).join(rest)
}

/// The rows of a golden case, padded as they are stored, how many targets they have, and their loss.
fn stored(family: &str, case: &str) -> (Vec<Value>, usize, f64) {
    let path = golden(family, &format!("cases/{case}.safetensors"));
    let tensors = read_all(open_tensor_file(&path).unwrap().as_ref()).unwrap();
    let rows = |name: &str| {
        let values = tensors[name].to_i64().unwrap();
        let rows = values.chunks(tensors[name].shape[1]).map(<[i64]>::to_vec);
        rows.collect::<Vec<_>>()
    };
    let (ids, labels) = (rows("input_ids"), rows("labels"));
    let is_target = |label: &&i64| **label != -100;
    let targets = labels.iter().flat_map(|row| &row[1..]);
    let targets = targets.filter(is_target).count();
    let rows = ids.into_iter().zip(labels);
    let rows = rows.map(|(ids, labels)| json!({ "input_ids": ids, "labels": labels }));
    let loss = tensors["loss"].to_f32().unwrap()[0];
    (rows.collect(), targets, f64::from(loss))
}

#[test]
fn losses_are_the_references_on_one_stage_and_on_three() {
    let setup = Setup::new();
    let mut losses = Vec::new();
    for (family, case, adapter) in [
        ("chatglm-6b", "forward_gmask", None),
        ("chatglm-6b", "lora_qkv", Some("adapter_lora_qkv")),
        ("chatglm-6b", "ptuning", Some("ptuning_checkpoint")),
        ("chatglm2-6b", "forward", None),
        ("chatglm2-6b", "lora_all", Some("adapters/lora_all")),
        ("chatglm2-6b", "ptuning_plain", Some("prefix/plain")),
        ("glm-4-9b", "forward", None),
        ("glm-4-9b", "lora_attn", Some("adapters/lora_attn")),
    ] {
        let (rows, targets, expected) = stored(family, case);
        let data = setup.rows("golden.jsonl", &rows);
        let mut found = Vec::new();
        for devices in ["cpu", "cpu,cpu,cpu"] {
            let mut command = Command::new(env!("CARGO_BIN_EXE_mp-train"));
            command.args(["eval", "--loss-only", "--output", "-", "--devices", devices]);
            command.arg("--data").arg(&data);
            command.arg("--model").arg(golden(family, "model"));
            if let Some(adapter) = adapter {
                command.arg("--adapter").arg(golden(family, adapter));
            }
            let ended = ended(command.output().unwrap());
            assert_eq!(ended.code, Some(0), "{family} {case}: {}", ended.stderr);
            let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
            assert_eq!(summary["rows"], rows.len());
            assert_eq!(summary["target_tokens"], targets);
            assert_eq!(summary.get("answers"), None);
            let (loss, perplexity) = (
                summary["loss"].as_f64().unwrap(),
                summary["perplexity"].as_f64().unwrap(),
            );
            assert!(
                (loss - expected).abs() < 2e-5,
                "{family} {case}: {loss}, not {expected}"
            );
            assert!((perplexity / loss.exp() - 1.0).abs() < 1e-12);
            // Standard output is a program's; a person reads it here.
            let line = format!("loss        {loss:>9.4}\n");
            assert!(ended.stderr.contains(&line));
            found.push(loss);
        }
        assert_eq!(found[0], found[1], "{family} {case}: stages differ");
        losses.push(found[0]);
    }
    let all = losses.len();
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(losses.len(), all, "an adapter changes nothing");
}

#[test]
fn the_loss_is_that_of_the_validation_in_training() {
    let setup = Setup::new();
    // More rows than go through the stages at once, of odd lengths.
    let row =
        |n: usize| json!({ "prompt": "q".repeat(1 + n % 7), "response": "ab".repeat(1 + n % 5) });
    let rows: Vec<Value> = (0..37).map(row).collect();
    let data = setup.rows("data.jsonl", &rows);
    let output = setup.folder.path().join("run");
    let mut train = setup.command("train");
    train.args([
        "--template",
        "prompt_response",
        "--max-steps",
        "3",
        "--quiet",
    ]);
    train.args(["--learning-rate", "0.05", "--lr-schedule", "constant"]);
    train
        .arg("--train")
        .arg(&data)
        .arg("--validation")
        .arg(&data);
    train.arg("--output").arg(&output);
    let trained: Ended = ended(train.output().unwrap());
    assert_eq!(trained.code, Some(0), "{}", trained.stderr);
    let validation = fs::read_to_string(output.join("validation.jsonl")).unwrap();
    let validation: Value = serde_json::from_str(validation.lines().last().unwrap()).unwrap();
    let adapter = output.join("adapter");
    let summary = setup.folder.path().join("summary.json");
    let measure = |flags: &[&str]| {
        let place = ["--loss-only", "--output", summary.to_str().unwrap()];
        let ended = evaluate(&setup, &data, &[&place, flags].concat());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let text = fs::read_to_string(&summary).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()
    };
    let found = measure(&["--adapter", adapter.to_str().unwrap()]);
    let expected = validation["loss"].as_f64().unwrap();
    let loss = |summary: &Value| summary["loss"].as_f64().unwrap();
    assert!((loss(&found) - expected).abs() < 1e-5, "{found} {expected}");
    assert_eq!(found["target_tokens"], validation["target_tokens"]);
    let base = loss(&measure(&[]));
    assert!((base - expected).abs() > 1e-3, "training changed nothing");
    let first = measure(&["--max-rows", "5"]);
    assert_eq!(
        (&first["rows"], first["target_tokens"].as_u64()),
        (&json!(5), Some(45))
    );
}
