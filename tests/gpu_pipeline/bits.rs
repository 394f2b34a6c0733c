//! The same bits on one GPU and on several.

use super::cuda_emulator::Emulator;
use super::gpu::{Manner, PLAIN, emulator, half, on_gpus, run_on_gpus};
use super::outcome::Outcome;
use super::program::succeed;
use super::setup::Setup;

const LATE: Manner = &[("EMULATOR_DEVICES", "4"), ("EMULATOR_STREAMS", "late")];
const EARLY: Manner = &[("EMULATOR_DEVICES", "4"), ("EMULATOR_STREAMS", "early")];

/// Where a run is laid out, and how.
struct Layout {
    devices: &'static str,
    flags: &'static [&'static str],
}

const fn on(devices: &'static str, flags: &'static [&'static str]) -> Layout {
    Layout { devices, flags }
}

const NCCL: &[&str] = &["--transport", "nccl"];
const P2P: &[&str] = &["--transport", "p2p"];

/// Two to four GPUs, both transports, several stages on a GPU.
const LAYOUTS: [Layout; 8] = [
    on("0,1", NCCL),
    on("0,1", P2P),
    on("0,1,2", &["--transport", "nccl", "--recompute", "block"]),
    on("0,1,2", P2P),
    on("0,1,2,3", NCCL),
    on("3,1,0,2", &["--transport", "p2p", "--schedule", "gpipe"]),
    on("0,0", &[]),
    on("0,1,0", &["--balance", "1,2,1"]),
];

/// Two chunks on each of two GPUs.
const INTERLEAVED: [Layout; 2] = [
    on("0,1", &["--schedule", "interleaved", "--transport", "nccl"]),
    on("1,0", &["--schedule", "interleaved", "--transport", "p2p"]),
];

/// A few steps on one GPU, and the same in each layout, with work done late and early.
fn same_bits(setup: &mut Setup, steps: usize, layouts: &[Layout]) {
    let Some(emulator) = emulator() else { return };
    setup.set_steps(steps);
    let alone = run_on_gpus(&emulator, setup, &setup.output("alone"), "0", PLAIN);
    for (index, layout) in layouts.iter().enumerate() {
        for (when, manner) in [("late", LATE), ("early", EARLY)] {
            let what = format!("{} {:?} {when}", layout.devices, layout.flags);
            let name = format!("{index}-{when}");
            again(&emulator, setup, &alone, layout, manner, &name, &what);
        }
    }
}

fn again(
    emulator: &Emulator,
    setup: &Setup,
    alone: &Outcome,
    layout: &Layout,
    manner: Manner,
    name: &str,
    what: &str,
) {
    let output = setup.output(name);
    let mut command = on_gpus(emulator, setup, &output, layout.devices, manner);
    succeed(command.args(layout.flags));
    Outcome::read(&output).assert_equals(alone, what);
}

fn whole_run(name: &str) {
    let Some(emulator) = emulator() else { return };
    let setup = half(name);
    let alone = run_on_gpus(&emulator, &setup, &setup.output("alone"), "0", PLAIN);
    for (when, manner) in [("late", LATE), ("early", EARLY)] {
        let what = format!("{name}, {when}");
        again(
            &emulator,
            &setup,
            &alone,
            &on("0,1,2", &[]),
            manner,
            when,
            &what,
        );
    }
}

#[test]
fn the_whole_golden_lora_on_three_gpus() {
    whole_run("lora_train");
}

#[test]
fn the_whole_golden_prefix_on_three_gpus() {
    whole_run("ptuning_train");
}

#[test]
fn lora_with_dropout() {
    let mut setup = half("lora_train");
    setup.unset("--init-adapter");
    setup.shuffle();
    setup.set("--lora-dropout", "0.2");
    same_bits(&mut setup, 3, &LAYOUTS);
    setup.set("--gradient-accumulation", "6");
    same_bits_again(&mut setup, &INTERLEAVED);
}

/// The same in another folder, because the steps are others.
fn same_bits_again(setup: &mut Setup, layouts: &[Layout]) {
    std::fs::remove_dir_all(setup.output("alone").parent().unwrap()).unwrap();
    same_bits(setup, 3, layouts);
}

#[test]
fn prefix_with_dropout() {
    let mut setup = half("ptuning_train");
    setup.set("--prefix-dropout", "0.3");
    setup.set("--gradient-accumulation", "4");
    same_bits(&mut setup, 3, &LAYOUTS);
    same_bits_again(&mut setup, &INTERLEAVED);
}

#[test]
fn projected_prefix() {
    let mut setup = half("ptuning_projection_train");
    setup.set("--gradient-accumulation", "4");
    same_bits(&mut setup, 2, &LAYOUTS[..5]);
    same_bits_again(&mut setup, &INTERLEAVED);
}

/// Two and four GPUs; the gradient of a tied matrix goes from the last stage to the first and back.
const WHOLE_MODEL: [Layout; 4] = [
    on("0,1", NCCL),
    on("0,1", P2P),
    on("0,1,2,3", NCCL),
    on("0,1,2,3", P2P),
];

#[test]
fn whole_model() {
    let mut setup = half("full_finetune_train");
    setup.set("--initial-loss-scale", "1024");
    same_bits(&mut setup, 2, &WHOLE_MODEL);
}

#[test]
fn whole_model_tied() {
    let mut setup = half("full_finetune_tied");
    setup.set("--initial-loss-scale", "1024");
    setup.set("--gradient-accumulation", "2");
    same_bits(&mut setup, 2, &WHOLE_MODEL);
    same_bits_again(&mut setup, &INTERLEAVED);
}

/// A frozen base of codes, on one GPU and on three.
const QUANTISED: [Layout; 2] = [on("0,1,2", NCCL), on("0,1,2", P2P)];

#[test]
fn lora_on_an_int8_base() {
    let mut setup = half("lora_train");
    setup.set("--quantization", "int8");
    same_bits(&mut setup, 3, &QUANTISED);
}

#[test]
fn lora_on_an_int4_base() {
    let mut setup = half("lora_train");
    setup.set("--quantization", "int4");
    same_bits(&mut setup, 3, &QUANTISED);
}

#[test]
fn prefix_on_an_int8_base() {
    let mut setup = half("ptuning_train");
    setup.set("--quantization", "int8");
    same_bits(&mut setup, 3, &QUANTISED);
}

#[test]
fn prefix_on_an_int4_base() {
    let mut setup = half("ptuning_train");
    setup.set("--quantization", "int4");
    same_bits(&mut setup, 3, &QUANTISED);
}
