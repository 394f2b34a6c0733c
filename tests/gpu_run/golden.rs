//! The golden training runs on one pretend GPU and on two: close to the reference, and bit-equal among
//! themselves however the GPU does its work.

use serde_json::Value;

use super::cuda_emulator::Emulator;
use super::family::Case;
use super::gpu::{ANY_SHAPE, BACKWARDS, MIXED, Manner, PLAIN, emulator, half, on_gpus, run_on_cpu};
use super::outcome::{Outcome, assert_same_metrics};
use super::program::succeed;
use super::setup::Setup;
use super::trace::Trace;

/// How far the loss of a step may lie from the reference in f32.
const LOSS: f64 = 0.05;
/// The same of the gradient's norm, as a share of it, while the weights are the same: in the first two
/// steps, as the first has learning rate 0.
const GRAD_NORM: f64 = 0.03;
/// How many times as far as that of the CPU in f16.
const TIMES_THE_CPU: f64 = 4.0;
/// Steps that are done again from a checkpoint, in other ways.
const AGAIN: usize = 3;

/// The case whose gradients overflow at the usual first loss scale, on the CPU in f16 too.
const OVERFLOWS: &str = "full_finetune_train";

#[test]
fn lora() {
    golden("lora_train");
}

#[test]
fn prefix() {
    golden("ptuning_train");
}

#[test]
fn projected_prefix() {
    golden("ptuning_projection_train");
}

#[test]
fn whole_model() {
    golden("full_finetune_train");
}

#[test]
fn whole_model_tied() {
    golden("full_finetune_tied");
}

fn golden(name: &str) {
    let Some(emulator) = emulator() else { return };
    let mut setup = half(name);
    if name == OVERFLOWS {
        setup.set("--initial-loss-scale", "1024");
    }
    let steps = setup.case.f32("train.loss").len();
    setup.set("--save-steps", &(steps - AGAIN).to_string());

    let output = setup.output("gpu");
    let trace = setup.folder.path().join("trace.jsonl");
    let mut command = on_gpus(&emulator, &setup, &output, "0", ANY_SHAPE);
    succeed(command.env("EMULATOR_TRACE", &trace));
    let gpu = Outcome::read(&output);
    let cpu = run_on_cpu(&setup, &setup.output("cpu"));
    compare_with_reference(&setup.case, &gpu, &cpu);
    let trace = Trace::read(&trace);
    assert_eq!(trace.steps(), steps);
    trace.assert_steady(Some(steps - AGAIN));

    for (devices, manner, flags) in [
        ("0", BACKWARDS, &["--recompute", "block"][..]),
        ("0,0", PLAIN, &["--schedule", "gpipe"]),
        ("0,1", MIXED, &["--recompute", "attention_free"]),
    ] {
        again(&emulator, &setup, &gpu, devices, manner, flags);
    }
}

/// The last steps from the checkpoint before them end in the same bits.
fn again(
    emulator: &Emulator,
    setup: &Setup,
    expected: &Outcome,
    devices: &str,
    manner: Manner,
    flags: &[&str],
) {
    let what = format!("{} on {devices}, {manner:?} {flags:?}", setup.case.name);
    let from = expected.metrics.len() - AGAIN;
    let output = setup.output(&format!("again-{devices}"));
    let mut command = on_gpus(emulator, setup, &output, devices, manner);
    let checkpoint = setup.output("gpu").join(format!("checkpoint-{from}"));
    command.arg("--resume").arg(checkpoint).args(flags);
    succeed(&mut command);
    let found = Outcome::read(&output);
    assert_same_metrics(&found.metrics, &expected.metrics[from..], &what);
    for (name, bytes) in &expected.files {
        assert!(*bytes == found.files[name], "{what}: {name:?} differs");
    }
}

/// The largest distance of a step's loss from the reference.
fn loss_error(case: &Case, outcome: &Outcome) -> f64 {
    let (found, expected) = (outcome.column("loss"), case.f32("train.loss"));
    assert_eq!(found.len(), expected.len());
    let errors = found.iter().zip(expected);
    let errors = errors.map(|(found, expected)| (found - f64::from(expected)).abs());
    errors.fold(0.0, f64::max)
}

fn compare_with_reference(case: &Case, gpu: &Outcome, cpu: &Outcome) {
    let name = &case.name;
    let skipped = |row: &Value| row["skipped"] == true;
    let skips = [gpu, cpu].map(|outcome| outcome.metrics.iter().map(skipped).collect::<Vec<_>>());
    assert_eq!(skips[0], skips[1], "{name}: skipped steps");
    assert_eq!(gpu.column("learning_rate"), cpu.column("learning_rate"));
    assert!(!skips[0].contains(&true), "{name}: skipped: {:?}", skips[0]);

    let [on_gpu, on_cpu] = [gpu, cpu].map(|outcome| loss_error(case, outcome));
    println!("{name}: loss off by {on_gpu:.2e} on the GPU, {on_cpu:.2e} on the CPU in f16");
    assert!(on_gpu > 0.0, "{name}: as exact as f32");
    assert!(on_gpu <= LOSS, "{name}: {on_gpu}");
    assert!(on_gpu <= TIMES_THE_CPU * on_cpu, "{name}: {on_gpu}");

    let norms = gpu.column("grad_norm");
    let expected = case.f32("train.grad_norm");
    for (norm, expected) in norms.into_iter().zip(expected).take(2) {
        let error = (norm / f64::from(expected) - 1.0).abs();
        println!("{name}: norm off by {error:.1e} of it");
        assert!(error <= GRAD_NORM, "{name}: norm {norm}, not {expected}");
    }
}
