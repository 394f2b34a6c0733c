//! What a run takes of a GPU's memory: what `mp-train plan` says, to the byte, and once.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::family::{family, read_json};
use super::gpu::{ANY_SHAPE, emulator, half, on_gpus};
use super::program::{mp_train, succeed};
use super::trace::Trace;

/// Runs of later generations whose memory is planned and counted: model, flags, and devices.
const LATER_RUNS: &[(&str, &str, &str)] = &[
    (
        "chatglm2-6b",
        "--kind lora --target-modules all-linear --recompute none",
        "0,1",
    ),
    (
        "chatglm2-6b",
        "--kind prefix --pre-seq-len 16 --prefix-projection true --recompute block",
        "0",
    ),
    (
        "chatglm2-6b",
        "--kind full --recompute attention_free",
        "0,1,2",
    ),
    (
        "glm-4-9b",
        "--kind lora --lora-dropout 0.1 --recompute block",
        "0,0",
    ),
    (
        "glm-4-9b",
        "--kind lora --quantization int4 --target-modules all-linear",
        "0,1",
    ),
    ("glm-4-9b", "--kind full --recompute none", "0,1"),
];

/// Runs whose memory is planned and counted: flags, and devices.
const RUNS: &[(&str, &str)] = &[
    ("--kind lora --r 4 --recompute none", "0"),
    (
        "--kind lora --r 3 --lora-dropout 0.1 --recompute attention_free --target-modules \
         query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
        "0,1",
    ),
    ("--kind lora --schedule gpipe --recompute block", "0,1,2"),
    ("--kind lora --schedule interleaved --recompute none", "0,1"),
    ("--kind lora --balance 1,1,1,1", "0,1,2,3"),
    ("--kind lora --recompute none", "0,0"),
    ("--kind prefix --pre-seq-len 16 --recompute none", "0"),
    (
        "--kind prefix --pre-seq-len 70 --prefix-dropout 0.1 --prefix-projection true --recompute block",
        "0,1",
    ),
    ("--kind full --recompute none", "0"),
    ("--kind full --recompute attention_free", "0,1,2"),
    ("--kind lora --quantization int8 --recompute block", "0"),
    (
        "--kind lora --quantization int4 --lora-dropout 0.1",
        "0,1,2",
    ),
    ("--kind prefix --quantization int4 --recompute none", "0,1"),
];

/// A golden model as it is, with embedding and head in two matrices, or with both in one.
fn copy_model(from: &Path, to: &Path, tied: bool) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    let mut config = read_json(&from.join("config.json"));
    config["tie_word_embeddings"] = tied.into();
    fs::write(to.join("config.json"), config.to_string()).unwrap();
}

/// What a run left in memory.jsonl: device, planned, used and further bytes of each stage.
fn used_memory(output: &Path) -> Vec<(String, u64, u64, u64)> {
    let text = fs::read_to_string(output.join("memory.jsonl")).unwrap();
    let row: Value = serde_json::from_str(text.lines().next_back().unwrap()).unwrap();
    let stages = row["stages"].as_array().unwrap().iter();
    let stage = |stage: &Value| {
        let bytes = |name: &str| stage[name].as_u64().unwrap();
        (
            stage["device"].as_str().unwrap().to_owned(),
            bytes("planned_bytes"),
            bytes("used_bytes"),
            bytes("beside_bytes"),
        )
    };
    stages.map(stage).collect()
}

/// Numbers of the column `name` of the plan's table, in bytes.
fn planned_column(plan: &str, name: &str) -> Vec<f64> {
    let mut lines = plan.lines().skip_while(|line| !line.starts_with("stage "));
    let head: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert!(head.contains(&"MB"), "{plan}");
    // What stands before the column may have spaces in it, what stands behind has none.
    let from_end = head.len() - head.iter().position(|column| *column == name).unwrap();
    let rows = lines.take_while(|line| line.starts_with(|c: char| c.is_ascii_digit()));
    let number = |row: &str| -> f64 {
        let words: Vec<&str> = row.split_whitespace().collect();
        words[words.len() - from_end].parse().unwrap()
    };
    rows.map(|row| 1e6 * number(row)).collect()
}

#[test]
fn planned_bytes_are_taken_at_once_and_used_to_the_last() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().unwrap();
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let rows = tests.join("data/golden_lora_train.jsonl");
    let first = RUNS
        .iter()
        .map(|&(flags, devices)| ("chatglm-6b", flags, devices));
    let runs = first.chain(LATER_RUNS.iter().copied());
    for (turn, (model, flags, devices)) in runs.enumerate() {
        let tied = turn % 2 == 1;
        let copy = folder.path().join(format!("{model}-tied-{tied}"));
        if !copy.exists() {
            copy_model(&tests.join("golden").join(model).join("model"), &copy, tied);
        }
        let what = format!("{model} {flags} --devices {devices}, tied {tied}");
        let output = folder.path().join(turn.to_string());
        let report = folder.path().join("report.json");
        // What a transport makes room for is known when it is.
        let shared = devices == "0,0";
        let transport = if shared || tied { "p2p" } else { "nccl" };
        let command = |subcommand: &[&str]| -> Command {
            let mut command = mp_train(subcommand);
            command
                .args(flags.split_whitespace())
                .args(["--devices", devices, "--transport", transport])
                .args(["--max-steps", "1"])
                .args(["--micro-batch-size", "3", "--gradient-accumulation", "4"])
                .arg("--model")
                .arg(&copy)
                .arg("--train")
                .arg(&rows)
                .arg("--output")
                .arg(&output);
            emulator.command_env(&mut command);
            command.env("EMULATOR_DEVICES", "4");
            command
        };
        let plan = succeed(&mut command(&["plan"])).stdout;
        succeed(command(&[]).env("EMULATOR_REPORT", &report));
        let stages = used_memory(&output);
        assert_eq!(stages.len(), devices.split(',').count(), "{what}");
        for (stage, (device, planned, used, beside)) in stages.iter().enumerate() {
            println!("{what}: stage {stage} on {device}: {planned} planned, {used} used");
            assert_eq!((used, beside), (planned, &0), "{what}: stage {stage}");
        }
        let shown = planned_column(&plan, "MB");
        let own = planned_column(&plan, "own");
        for ((shown, own), stage) in shown.iter().zip(own).zip(&stages) {
            assert!(
                (shown - own - stage.1 as f64).abs() <= 10_001.0,
                "{what}\n{plan}"
            );
        }
        // What the driver counted, which knows nothing of plans.
        let counters: Value = serde_json::from_str(&fs::read_to_string(&report).unwrap()).unwrap();
        let mut on_devices: BTreeMap<&str, u64> = BTreeMap::new();
        for (device, planned, ..) in &stages {
            *on_devices.entry(device).or_default() += planned.next_multiple_of(512);
        }
        for (device, planned) in on_devices {
            let counted = counters[format!("peak_bytes:{device}")].as_u64();
            assert_eq!(counted, Some(planned), "{what}: device {device}");
        }
        assert_eq!(counters.get("damaged_red_zones"), None, "{what}");
    }
}

/// Tokens of a micro-batch, at most.
const BUDGET: usize = 168;

/// Rows for micro-batches of `BUDGET` tokens: one short row, one long row, many of the shortest.
fn growing_rows() -> String {
    let id = |key: &str| family().config[key].as_i64().unwrap();
    let row = |prompt: usize, answer: usize| {
        let prompt = (0..prompt).map(|n| 5 + n as i64 % 90);
        let context = prompt.chain([id("gmask_token_id"), id("bos_token_id")]);
        let mut ids: Vec<i64> = context.collect();
        let mut labels = vec![-100; ids.len()];
        let target = (0..answer).map(|n| 7 + n as i64 % 50);
        let target: Vec<i64> = target.chain([id("eos_token_id")]).collect();
        ids.extend(&target);
        labels.extend(&target);
        format!("{}\n", json!({ "input_ids": ids, "labels": labels }))
    };
    let mut rows = row(1, 1) + &row(80, BUDGET - 3 - 83);
    rows.extend((0..BUDGET / 3).map(|_| row(0, 0)));
    rows
}

#[test]
fn nothing_is_taken_or_loaded_when_micro_batches_grow() {
    let Some(emulator) = emulator() else { return };
    for name in ["lora_train", "ptuning_train", "full_finetune_train"] {
        let mut setup = half(name);
        fs::write(&setup.rows, growing_rows()).unwrap();
        setup.unset("--micro-batch-size");
        setup.set("--micro-batch-tokens", &BUDGET.to_string());
        setup.set("--gradient-accumulation", "1");
        setup.set_steps(3);
        let trace = setup.folder.path().join("trace.jsonl");
        let mut command = on_gpus(&emulator, &setup, &setup.output("run"), "0", ANY_SHAPE);
        succeed(command.env("EMULATOR_TRACE", &trace));
        let trace = Trace::read(&trace);
        assert_eq!(trace.steps(), 3);
        trace.assert_steady(None);
    }
}
