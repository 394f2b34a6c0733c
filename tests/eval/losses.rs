//! Loss and perplexity against the golden runs and against training.

use std::fs;

use mp_train::checkpoint::{open_tensor_file, read_all};
use serde_json::{Value, json};

use super::answers::evaluate;
use super::setup::{Ended, Setup, golden};

/// The rows of a golden case, padded as they are stored.
fn golden_rows(case: &str) -> Vec<Value> {
    let source = open_tensor_file(&golden(&format!("cases/{case}.safetensors"))).unwrap();
    let tensors = read_all(source.as_ref()).unwrap();
    let rows = |name: &str| {
        let values = tensors[name].to_i64().unwrap();
        let rows = values.chunks(tensors[name].shape[1]).map(<[i64]>::to_vec);
        rows.collect::<Vec<_>>()
    };
    let rows = rows("input_ids").into_iter().zip(rows("labels"));
    rows.map(|(ids, labels)| json!({ "input_ids": ids, "labels": labels }))
        .collect()
}

fn loss(case: &str) -> f64 {
    let source = open_tensor_file(&golden(&format!("cases/{case}.safetensors"))).unwrap();
    let loss = read_all(source.as_ref()).unwrap()["loss"].to_f32().unwrap();
    f64::from(loss[0])
}

/// The flags that put an adapter over the model.
fn adapter_flags(name: Option<&str>) -> Vec<String> {
    let folder = |name| golden(name).to_str().unwrap().to_owned();
    name.map_or(Vec::new(), |name| {
        vec!["--adapter".to_owned(), folder(name)]
    })
}

#[test]
fn losses_are_the_references_on_one_stage_and_on_three() {
    let setup = Setup::new();
    for (case, adapter) in [
        ("forward_gmask", None),
        ("lora_qkv", Some("adapter_lora_qkv")),
        ("ptuning", Some("ptuning_checkpoint")),
    ] {
        let rows = golden_rows(case);
        let data = setup.rows("golden.jsonl", &rows);
        let mut found = Vec::new();
        for devices in ["cpu", "cpu,cpu,cpu"] {
            let adapter = adapter_flags(adapter);
            let mut flags = vec!["--loss-only", "--output", "-", "--devices", devices];
            flags.extend(adapter.iter().map(String::as_str));
            let ended = evaluate(&setup, &data, &flags);
            assert_eq!(ended.code, Some(0), "{}", ended.stderr);
            let summary: Value = serde_json::from_str(&ended.stdout).unwrap();
            assert_eq!(summary["rows"], rows.len());
            assert_eq!(summary["target_tokens"], 26);
            assert_eq!(summary.get("answers"), None);
            let (loss, perplexity) = (
                summary["loss"].as_f64().unwrap(),
                summary["perplexity"].as_f64().unwrap(),
            );
            assert!((loss - self::loss(case)).abs() < 2e-5, "{case}: {loss}");
            assert!((perplexity / loss.exp() - 1.0).abs() < 1e-12);
            // Standard output is a program's; a person reads it here.
            assert!(ended.stderr.contains(&format!("loss        {loss:>9.4}\n")));
            found.push(loss);
        }
        assert_eq!(found[0], found[1], "{case}: one stage and three differ");
    }
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
    let trained: Ended = super::setup::ended(train.output().unwrap());
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
