//! Commands on pretend GPUs.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use super::cuda_emulator::Emulator;
use super::family::family;
use super::outcome::Outcome;
use super::program::{mp_train, succeed};
use super::setup::Setup;

/// How the pretend GPUs do their work: environment variables of the emulator.
pub type Manner<'a> = &'a [(&'a str, &'a str)];

/// Threads and blocks in ascending order, work as late as it may come.
pub const PLAIN: Manner = &[];
/// The same, and the pretend cuBLASLt's algorithms take any number of rows, as those of the real one
/// mostly do; else every number of rows needs an algorithm of its own.
pub const ANY_SHAPE: Manner = &[("EMULATOR_ALGORITHMS", "any")];
/// Threads and blocks in descending order, work as soon as it is queued.
pub const BACKWARDS: Manner = &[("EMULATOR_ORDER", "reverse"), ("EMULATOR_STREAMS", "early")];
/// Threads and blocks by chance, two GPUs.
pub const MIXED: Manner = &[
    ("EMULATOR_ORDER", "random"),
    ("EMULATOR_SEED", "3"),
    ("EMULATOR_DEVICES", "2"),
];

/// The emulator with all kernels compiled for its default GPU, which otherwise every test would do at
/// once.
pub fn emulator() -> Option<Emulator> {
    static WARM: OnceLock<()> = OnceLock::new();
    let emulator = Emulator::build()?;
    WARM.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let prompt = folder.path().join("prompt.jsonl");
        let config = &family().config;
        let sop = &config["bos_token_id"];
        let gmask = &config["gmask_token_id"];
        std::fs::write(&prompt, format!("{{\"input_ids\": [5, {gmask}, {sop}]}}\n")).unwrap();
        let mut command = mp_train(["generate", "--max-new-tokens", "1", "--model"]);
        command.arg(family().path("model"));
        command.arg("--input").arg(prompt).args(["--devices", "0"]);
        emulator.command_env(&mut command);
        succeed(&mut command);
    });
    Some(emulator)
}

/// A golden training run in f16, with the rotary tables of the reference.
pub fn half(name: &str) -> Setup {
    let mut setup = Setup::golden(name);
    setup.set("--precision", "f16");
    setup.set("--rotary-table", "f32");
    setup
}

/// The command of a run on GPUs.
pub fn on_gpus(
    emulator: &Emulator,
    setup: &Setup,
    output: &Path,
    devices: &str,
    manner: Manner,
) -> Command {
    let mut command = setup.command_without_layout(output);
    command.args(["--devices", devices]);
    emulator.command_env(&mut command);
    command.envs(manner.iter().copied());
    command
}

/// The outcome of a run on GPUs.
#[track_caller]
pub fn run_on_gpus(
    emulator: &Emulator,
    setup: &Setup,
    output: &Path,
    devices: &str,
    manner: Manner,
) -> Outcome {
    succeed(&mut on_gpus(emulator, setup, output, devices, manner));
    Outcome::read(output)
}

/// The outcome of the same run on the CPU.
#[track_caller]
pub fn run_on_cpu(setup: &Setup, output: &Path) -> Outcome {
    let mut command = setup.command_without_layout(output);
    succeed(command.args(["--devices", "cpu", "--threads", "1"]));
    Outcome::read(output)
}
