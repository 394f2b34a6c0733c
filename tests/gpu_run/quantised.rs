//! A base of codes on pretend GPUs: the same bits on one and on three, close to the CPU.

use super::gpu::{MIXED, Manner, PLAIN, emulator, half, run_on_cpu, run_on_gpus};
use super::outcome::Outcome;

const STEPS: usize = 3;
/// How far the loss of a step may lie from the CPU's.
const LOSS: f64 = 0.05;

const THREE: Manner = &[("EMULATOR_DEVICES", "3"), ("EMULATOR_STREAMS", "early")];

#[test]
fn lora_over_int4() {
    on_one_and_three("lora_train", "int4");
}

#[test]
fn lora_over_int8() {
    on_one_and_three("lora_train", "int8");
}

#[test]
fn prefix_over_int4() {
    on_one_and_three("ptuning_train", "int4");
}

#[test]
fn projected_prefix_over_int8() {
    on_one_and_three("ptuning_projection_train", "int8");
}

fn on_one_and_three(name: &str, quantization: &str) {
    let Some(emulator) = emulator() else { return };
    let mut setup = half(name);
    setup.set_steps(STEPS);
    setup.set("--quantization", quantization);
    let run = |devices: &str, manner: Manner, output: &str| -> Outcome {
        run_on_gpus(&emulator, &setup, &setup.output(output), devices, manner)
    };
    let one = run("0", PLAIN, "one");
    for (devices, manner, output) in [("0,1,2", THREE, "three"), ("0,1", MIXED, "two")] {
        let found = run(devices, manner, output);
        found.assert_equals(&one, &format!("{name} over {quantization} on {devices}"));
    }
    let cpu = run_on_cpu(&setup, &setup.output("cpu"));
    let losses = one.column("loss").into_iter().zip(cpu.column("loss"));
    for (gpu, cpu) in losses {
        assert!((gpu - cpu).abs() <= LOSS, "{gpu} {cpu}");
    }

    setup.set("--quantization", "none");
    let full = run_on_cpu(&setup, &setup.output("full"));
    assert_ne!(full.metrics, cpu.metrics, "{quantization} changes nothing");
}
