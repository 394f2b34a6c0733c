//! Runs that end too early on a pretend GPU and go on, there or elsewhere.

use rustix::process::Signal;

use super::gpu::{
    BACKWARDS, MIXED, Manner, PLAIN, emulator, half, on_gpus, run_on_cpu, run_on_gpus,
};
use super::outcome::{Outcome, checkpoints, metrics};
use super::program::{fail, interrupt, lines, succeed};
use super::setup::Setup;

/// Left alone; stopped by a signal at work that is done at once, and finished backwards.
fn stopped_as_if_not(setup: &mut Setup, steps: usize) {
    let Some(emulator) = emulator() else { return };
    setup.set_steps(steps);
    setup.set("--shuffle", "true");
    let alone = run_on_gpus(&emulator, setup, &setup.output("alone"), "0", PLAIN);

    let output = setup.output("stopped");
    let early: Manner = &[("EMULATOR_STREAMS", "early")];
    let mut command = on_gpus(&emulator, setup, &output, "0", early);
    let metrics_file = output.join("metrics.jsonl");
    let ended = interrupt(&mut command, Signal::TERM, || lines(&metrics_file) >= 2);
    assert_eq!(ended.code, Some(130), "{}", ended.stderr);
    let done = metrics(&output).len();
    assert!((2..steps).contains(&done), "{done} of {steps} steps");
    assert_eq!(checkpoints(&output), [done as u64]);

    let mut command = on_gpus(&emulator, setup, &output, "0", BACKWARDS);
    succeed(command.arg("--resume"));
    Outcome::read(&output).assert_equals(&alone, "stopped and resumed");
}

#[test]
fn lora_with_dropout_stopped_by_sigterm() {
    let mut setup = half("lora_train");
    setup.unset("--init-adapter");
    setup.set(
        "--target-modules",
        "query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
    );
    setup.set("--lora-dropout", "0.2");
    stopped_as_if_not(&mut setup, 6);
}

#[test]
fn prefix_with_dropout_stopped_by_sigterm() {
    let mut setup = half("ptuning_projection_train");
    setup.set("--prefix-dropout", "0.3");
    stopped_as_if_not(&mut setup, 6);
}

#[test]
fn a_checkpoint_goes_from_cpu_to_gpu_and_back() {
    let Some(emulator) = emulator() else { return };
    let mut setup = half("lora_train");
    setup.set_steps(9);
    setup.set("--save-steps", "3");
    let on_cpu = run_on_cpu(&setup, &setup.output("cpu"));

    let on_gpu = setup.output("gpu");
    let mut command = on_gpus(&emulator, &setup, &on_gpu, "0,1", MIXED);
    let first = setup.output("cpu").join("checkpoint-3");
    succeed(command.arg("--resume").arg(first));
    let back = setup.output("back");
    let mut command = setup.command_without_layout(&back);
    command.args(["--devices", "cpu", "--resume"]);
    succeed(command.arg(on_gpu.join("checkpoint-6")));

    let expected = on_cpu.column("loss");
    for (output, from) in [(on_gpu, 3), (back, 6)] {
        let outcome = Outcome::read(&output);
        let found = outcome.column("loss");
        assert_eq!(found.len(), expected.len() - from);
        for (found, expected) in found.iter().zip(&expected[from..]) {
            assert!((found - expected).abs() < 0.02, "{found} {expected}");
        }
        assert!(outcome.metrics.iter().all(|row| row["skipped"] == false));
    }
}

#[test]
fn a_gpu_that_fails_leaves_the_last_checkpoint_whole() {
    let Some(emulator) = emulator() else { return };
    let mut setup = half("lora_train");
    setup.set_steps(4);
    setup.set("--save-steps", "2");
    let alone = run_on_gpus(&emulator, &setup, &setup.output("alone"), "0", PLAIN);

    let output = setup.output("failing");
    // Two stages: the one that is well must end, too. The other is told by its number.
    let two: Manner = &[
        ("EMULATOR_DEVICES", "2"),
        ("EMULATOR_FAIL", "launch:cross_entropy:9"),
    ];
    let mut command = on_gpus(&emulator, &setup, &output, "0,1", two);
    fail(&mut command, 1, &["stage 1, step 4, F0 on CUDA device 1"]);
    assert_eq!(checkpoints(&output), [2]);
    assert!(!output.join("adapter").exists());

    let resumed = |manner: Manner| {
        let mut command = on_gpus(&emulator, &setup, &output, "0", manner);
        command.arg("--resume");
        command
    };
    let early: Manner = &[
        ("EMULATOR_STREAMS", "early"),
        ("EMULATOR_FAIL", "launch:attention_forward_16:7"),
    ];
    fail(
        &mut resumed(early),
        1,
        &["stage 0, step 3, F0", "attention_forward"],
    );
    // Some products are tried and others rehearsed before the first step.
    let product: Manner = &[("EMULATOR_FAIL", "product:40")];
    fail(&mut resumed(product), 1, &["stage 0, step 3", "cuBLASLt"]);
    assert_eq!(checkpoints(&output), [2]);

    succeed(&mut resumed(PLAIN));
    Outcome::read(&output).assert_equals(&alone, "after failures");
}
