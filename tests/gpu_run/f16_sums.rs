//! Products summed in f16 on pretend GPUs: other bits than in f32, the same ones in every layout, losses and
//! gradients near those of the reference, and a run that keeps to them.

use super::cuda_emulator::Emulator;
use super::gpu::{ANY_SHAPE, BACKWARDS, MIXED, Manner, emulator, half, on_gpus, run_on_gpus};
use super::program::{fail, succeed};

const STEPS: usize = 4;
/// How far the loss of a step may lie from the reference in f32, as with sums in f32.
const LOSS: f64 = 0.05;
/// How far loss and gradient norm of the first step, where the weights are the same, may lie from those with
/// sums in f32, as shares of them. A rounding to f16 is 0.0005.
const FIRST_STEP: f64 = 0.002;

#[test]
fn lora() {
    near_the_reference("lora_train");
}

#[test]
fn prefix() {
    near_the_reference("ptuning_train");
}

fn near_the_reference(name: &str) {
    let Some(emulator) = emulator() else { return };
    let mut setup = half(name);
    let all = setup.case.f32("train.loss").len();
    let run = |setup: &super::setup::Setup, devices: &str, manner: Manner, output: &str| {
        run_on_gpus(&emulator, setup, &setup.output(output), devices, manner)
    };
    setup.set("--product-sums", "f16");
    let found = run(&setup, "0", ANY_SHAPE, "f16");
    let losses = found.column("loss").into_iter();
    let expected = setup.case.f32("train.loss");
    assert_eq!(losses.len(), all);
    let errors = losses.zip(&expected);
    let errors = errors.map(|(loss, &expected)| (loss - f64::from(expected)).abs());
    let worst = errors.fold(0.0, f64::max);
    println!("{name}: loss off by {worst:.2e} with sums in f16");
    assert!(worst <= LOSS, "{name}: {worst}");
    assert!(found.metrics.iter().all(|row| row["skipped"] == false));

    setup.set_steps(STEPS);
    let one = run(&setup, "0", ANY_SHAPE, "one");
    for (devices, manner, output) in [("0", BACKWARDS, "backwards"), ("0,1", MIXED, "two")] {
        let again = run(&setup, devices, manner, output);
        again.assert_equals(&one, &format!("{name} on {devices}"));
    }
    setup.set("--product-sums", "f32");
    let single = run(&setup, "0", ANY_SHAPE, "f32");
    assert_ne!(
        one.metrics, single.metrics,
        "{name}: sums in f16 change nothing"
    );
    for column in ["loss", "grad_norm"] {
        let first = |outcome: &super::outcome::Outcome| outcome.column(column)[0];
        let share = (first(&one) / first(&single) - 1.0).abs();
        println!("{name}: {column} of the first step off by {share:.1e} of it");
        assert!(share <= FIRST_STEP, "{name}: {column} off by {share} of it");
    }
    if name == "lora_train" {
        goes_on_only_as_it_began(&emulator);
    }
}

fn goes_on_only_as_it_began(emulator: &Emulator) {
    let mut setup = half("lora_train");
    setup.set_steps(2);
    setup.set("--product-sums", "f16");
    let output = setup.output("begun");
    succeed(&mut on_gpus(emulator, &setup, &output, "0", ANY_SHAPE));
    setup.set("--product-sums", "f32");
    setup.set_steps(3);
    let mut command = on_gpus(emulator, &setup, &output, "0", ANY_SHAPE);
    command.arg("--resume");
    fail(&mut command, 2, &["model.product_sums", "f16", "f32"]);
}
