//! The plan as it is printed.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::program::{fail, mp_train, run, succeed};

/// A command without GPUs and without the libraries of any.
fn plan(arguments: &str) -> Command {
    let mut command = mp_train(["plan"]);
    command.args(arguments.split_whitespace());
    command.env("LD_LIBRARY_PATH", "/nonexistent");
    command
}

const CASES: [(&str, &str); 4] = [
    (
        "three cards of 24 GB",
        "--size chatglm-6b --sequence-length 1024 --micro-batch-size 4 --devices 0,1,2 \
         --memory-per-device 24GB",
    ),
    (
        "int4 on a small card",
        "--size chatglm-6b --sequence-length 128 --kind prefix --quantization int4 --devices 0 \
         --memory-per-device 8GB --tflops 30",
    ),
    (
        "interleaved",
        "--size chatglm-6b --sequence-length 512 --schedule interleaved --virtual-stages 7 --devices \
         0,1,2,3 --memory-per-device 24GB --link-gbps 100",
    ),
    (
        "the whole model, which does not fit",
        "--size chatglm-6b --sequence-length 512 --kind full --devices 0,1,2,3 --memory-per-device 24GB",
    ),
];

/// `UPDATE_SNAPSHOTS=1` writes what is printed now.
#[test]
fn plans_are_printed_as_they_were() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plan/expected.txt");
    let mut found = String::new();
    for (name, arguments) in CASES {
        let ended = run(&mut plan(arguments));
        found += &format!("== {name}\n$ mp-train plan {arguments}\n{}", ended.stdout);
        found += &ended.stderr;
        found += &format!("[exit {}]\n\n", ended.code.unwrap());
        let wide = ended.stdout.lines().find(|line| line.len() > 100);
        assert_eq!(wide, None, "{name}");
    }
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, &found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap();
    for (found, expected) in found.lines().zip(expected.lines()) {
        assert_eq!(found, expected);
    }
    assert_eq!(found, expected);
}

#[test]
fn a_plan_of_real_rows_counts_them() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command =
        plan("--devices cpu,cpu --memory-per-device 1GB --micro-batch-size 2 --model");
    command
        .arg(root.join("tests/golden/chatglm-6b/model"))
        .arg("--train")
        .arg(root.join("tests/data/golden_lora_train.jsonl"));
    let said = succeed(&mut command).stdout;
    assert!(said.contains("20 rows, "), "{said}");
    assert!(said.contains("% of them with a target"), "{said}");
}

#[test]
fn what_a_plan_cannot_do_without_is_said() {
    for (arguments, words) in [
        ("", "no model to plan for"),
        (
            "--size chatglm-6b --devices cpu --train rows.jsonl",
            "--sequence-length",
        ),
        (
            "--size chatglm-6b --sequence-length 4096 --devices cpu",
            "1 to 2048",
        ),
        (
            "--size chatglm-6b --sequence-length 64 --devices 0",
            "libcuda.so.1",
        ),
        (
            "--size chatglm-6b --sequence-length 64 --tflops 0",
            "above 0",
        ),
        (
            "--size chatglm-6b --sequence-length 64 --target-share 2",
            "from 0 to 1",
        ),
    ] {
        let code = if words.starts_with("lib") { 1 } else { 2 };
        fail(&mut plan(arguments), code, &[words]);
    }
}
