//! What a run takes of a GPU's memory: what `mp-train plan` says, and once.

use std::fs;
use std::process::Command;

use mp_train::backend::cuda::OWN_MEMORY;
use serde_json::json;

use super::family::family;
use super::gpu::{ANY_SHAPE, emulator, half, on_gpus};
use super::model;
use super::program::{fail, mp_train, succeed};
use super::trace::Trace;

/// The last column of a plan's only stage, in MiB.
fn planned_mib(plan: &str) -> f64 {
    let row = plan.lines().find(|line| line.starts_with("0 ")).unwrap();
    row.split_whitespace().next_back().unwrap().parse().unwrap()
}

#[test]
fn a_stage_takes_at_once_what_the_plan_says_and_little_beside_it() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().unwrap();
    let rows = model::untrained().parent().unwrap().join("tuning.jsonl");
    let trace = folder.path().join("trace.jsonl");
    for (turn, flags) in [
        "--kind lora --r 4 --recompute none",
        "--kind prefix --pre-seq-len 16 --prefix-projection true --recompute block",
        "--kind full --recompute none",
        "--kind lora --r 4 --recompute none --quantization int8",
        "--kind prefix --pre-seq-len 16 --recompute block --quantization int4",
    ]
    .into_iter()
    .enumerate()
    {
        let train = |subcommand: &[&str]| -> Command {
            let mut command = mp_train(subcommand);
            command
                .args(flags.split_whitespace())
                .args(["--devices", "0", "--max-steps", "1"])
                .args(["--micro-batch-size", "16", "--model"])
                .arg(model::untrained())
                .arg("--train")
                .arg(&rows)
                .arg("--output")
                .arg(folder.path().join(turn.to_string()));
            emulator.command_env(&mut command);
            command
        };
        let planned = planned_mib(&succeed(&mut train(&["plan"])).stdout);
        // It is enough to see that everything is there: the first kernel fails.
        let _ = fs::remove_file(&trace);
        let mut command = train(&[]);
        command.env("EMULATOR_FAIL", "launch:embed:1");
        fail(command.env("EMULATOR_TRACE", &trace), 1, &["CUDA device 0"]);
        let allocations = Trace::read(&trace).allocations();
        // 1 MiB is for the rounding of many small buffers.
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20) - 1.0;
        let is_planned = |bytes: &&u64| (mib(**bytes) - planned).abs() <= 0.051;
        println!("{flags}: {planned} MiB planned, {allocations:?} taken");
        assert_eq!(allocations.iter().filter(is_planned).count(), 1, "{flags}");
        // Workspace, scratch, and three tables of a micro-batch's sequences.
        assert!(allocations.len() <= 7, "{flags}: {allocations:?}");
        let beside: u64 = allocations.iter().filter(|bytes| !is_planned(bytes)).sum();
        assert!(beside <= OWN_MEMORY, "{flags}: {beside} bytes");
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
