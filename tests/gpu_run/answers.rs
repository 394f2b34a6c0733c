//! Answers of a pretend GPU, and the demo's LoRA run on it: those of the CPU in f16.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::cuda_emulator::Emulator;
use super::gpu::{BACKWARDS, MIXED, Manner, PLAIN, emulator};
use super::model;
use super::outcome::{column, metrics};
use super::program::{mp_train, succeed};
use super::text_setup::{self, golden, golden_answers, ids, parse};

/// The command on GPUs, or on the CPU in f16.
fn place<'a>(
    command: &'a mut Command,
    emulator: &Emulator,
    devices: &str,
    manner: Manner,
) -> &'a mut Command {
    command.args(["--precision", "f16", "--devices", devices]);
    if devices != "cpu" {
        emulator.command_env(command);
    }
    command.envs(manner.iter().copied())
}

#[test]
fn greedy_ids_are_those_of_the_cpu() {
    let Some(emulator) = emulator() else { return };
    let setup = text_setup::Setup::new();
    for (kind, adapter) in [
        ("plain", None),
        ("lora", Some(golden("adapter_lora_qkv"))),
        ("ptuning", Some(golden("ptuning_checkpoint"))),
    ] {
        let cases = golden_answers(match kind {
            "ptuning" => "ptuning",
            _ => "plain",
        });
        let rows: Vec<Value> = cases
            .iter()
            .map(|(ids, _)| json!({ "input_ids": ids }))
            .collect();
        let new_tokens = cases[0].1.len().to_string();
        let input = setup.rows("rows.jsonl", &rows);
        let answers = |devices: &str, manner: Manner| -> Vec<Vec<u32>> {
            let mut command = setup.command("generate");
            command
                .arg("--input")
                .arg(&input)
                .stdin(File::open("/dev/null").unwrap());
            command.args(["--no-stop-at-eop", "--rotary-table", "f32"]);
            command.args(["--max-new-tokens", &new_tokens]);
            if let Some(adapter) = &adapter {
                command.arg("--adapter").arg(adapter);
            }
            let ended = succeed(place(&mut command, &emulator, devices, manner));
            parse(&ended.stdout).iter().map(ids).collect()
        };
        let expected = answers("cpu", PLAIN);
        assert_eq!(answers("0", BACKWARDS), expected, "{kind}");
        assert_eq!(answers("0,1", MIXED), expected, "{kind}");
        if kind != "lora" {
            let reference: Vec<Vec<u32>> = cases.into_iter().map(|(_, ids)| ids).collect();
            assert_eq!(expected, reference, "{kind} in f16 on the CPU");
        }
    }
}

#[test]
fn a_chat_is_that_of_the_cpu() {
    let Some(emulator) = emulator() else { return };
    let setup = text_setup::Setup::new();
    let lines = setup.folder.path().join("lines.txt");
    fs::write(&lines, "who are you?\nwhy?\n/clear\nreally?\n").unwrap();
    for sampling in [&text_setup::GREEDY[..], &["--seed", "5"]] {
        let said = |devices: &str, manner: Manner| {
            let mut command = setup.command("chat");
            command.stdin(File::open(&lines).unwrap());
            command.args(sampling).args(["--max-new-tokens", "6"]);
            succeed(place(&mut command, &emulator, devices, manner)).stdout
        };
        let expected = said("cpu", PLAIN);
        assert_eq!(expected.lines().count(), 3);
        assert_eq!(said("0", PLAIN), expected);
    }
}

/// As the demo's settings, but for precision and steps. Its base learns for 500 steps; here for some,
/// so that the loss depends on what is asked.
fn demo_run(model: &Path, rows: &str, output: &Path, flags: &str) -> Command {
    let mut command = mp_train(flags.split_whitespace());
    command
        .args("--lr-schedule linear --weight-decay 0 --max-grad-norm 1".split(' '))
        .args("--shuffle true --seed 7 --log-steps 1000 --threads 1".split(' '))
        .arg("--model")
        .arg(model)
        .arg("--train")
        .arg(model::untrained().with_file_name(rows))
        .arg("--output")
        .arg(output);
    command
}

#[test]
fn the_demos_lora_run_is_that_of_the_cpu() {
    let Some(emulator) = emulator() else { return };
    let folder = tempfile::tempdir().unwrap();
    let base = folder.path().join("base");
    let flags = "--kind full --learning-rate 3e-3 --micro-batch-size 32 --max-steps 30 \
                 --warmup-steps 5 --recompute none";
    succeed(&mut demo_run(
        model::untrained(),
        "base.jsonl",
        &base,
        flags,
    ));

    let lora = |devices: &str, manner: Manner| {
        let output = folder.path().join(devices);
        let flags = "--kind lora --r 8 --lora-alpha 16 --target-modules query_key_value \
                     --learning-rate 5e-3 --micro-batch-size 8 --gradient-accumulation 4 \
                     --max-steps 20 --rotary-table f32";
        let mut command = demo_run(&base.join("model"), "tuning.jsonl", &output, flags);
        succeed(place(&mut command, &emulator, devices, manner));
        let rows = metrics(&output);
        assert!(rows.iter().all(|row| row["skipped"] == false));
        ["loss", "grad_norm"].map(|key| column(&rows, key))
    };
    let ([expected, _], [found, norms]) = (lora("cpu", PLAIN), lora("0", PLAIN));
    assert_eq!(found.len(), 20);
    let errors = found.iter().zip(&expected);
    let worst = errors.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!(
        "loss from {} to {}, off by {worst:.1e}",
        found[0], found[19]
    );
    assert!(worst > 0.0 && worst <= 0.05, "{worst}");
    // lora_B was zero, and no gradient came through it.
    assert!(norms[19] > 2.0 * norms[0], "{norms:?}");
}
