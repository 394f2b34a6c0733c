//! What stages are connected by, and what is said of it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::cuda_emulator::Emulator;
use super::gpu::{PLAIN, emulator, half, on_gpus, run_on_gpus};
use super::outcome::Outcome;
use super::program::{fail, succeed};
use super::setup::Setup;

/// A short run on the GPUs 0 and 1 of two.
fn on_two(emulator: &Emulator, setup: &Setup, output: &Path) -> Command {
    on_gpus(emulator, setup, output, "0,1", &[("EMULATOR_DEVICES", "2")])
}

fn short() -> Setup {
    let mut setup = half("lora_train");
    setup.set_steps(2);
    setup
}

/// The pretend libraries but for NCCL.
fn without_nccl(command: &mut Command, setup: &Setup) {
    let given = command
        .get_envs()
        .find(|(name, _)| *name == "LD_LIBRARY_PATH");
    let given = Path::new(given.unwrap().1.unwrap()).to_owned();
    let folder = setup.folder.path().join("libraries");
    fs::create_dir_all(&folder).unwrap();
    for entry in fs::read_dir(given).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("lib") && !name.starts_with("libnccl") {
            let _ = symlink(&path, folder.join(name));
        }
    }
    command.env("LD_LIBRARY_PATH", folder);
}

#[test]
fn nccl_where_it_is_found() {
    let Some(emulator) = emulator() else { return };
    let setup = short();
    let ended = succeed(&mut on_two(&emulator, &setup, &setup.output("nccl")));
    let said = "activations travel by NCCL 2.";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
}

#[test]
fn peer_copies_where_nccl_is_not_found_or_a_gpu_has_two_stages() {
    let Some(emulator) = emulator() else { return };
    let setup = short();
    let mut command = on_two(&emulator, &setup, &setup.output("without"));
    without_nccl(&mut command, &setup);
    let report = setup.folder.path().join("report.json");
    let ended = succeed(command.env("EMULATOR_REPORT", &report));
    let counters: Value = serde_json::from_str(&fs::read_to_string(report).unwrap()).unwrap();
    for device in ["0", "1"] {
        // The direct way is taken where there is one, and only between GPUs.
        assert_eq!(counters[format!("peer_accesses:{device}")], 1, "{counters}");
        assert!(counters[format!("peer_copies:{device}")].as_u64() > Some(0));
    }
    for said in ["travel by p2p", "pip install nvidia-nccl-cu12"] {
        assert!(ended.stderr.contains(said), "{}", ended.stderr);
    }
    let output = setup.output("shared");
    let ended = succeed(&mut on_gpus(&emulator, &setup, &output, "0,0", PLAIN));
    assert!(ended.stderr.contains("travel by p2p"), "{}", ended.stderr);
}

#[test]
fn nccl_that_was_asked_for_and_cannot_be_had() {
    let Some(emulator) = emulator() else { return };
    let setup = short();
    let mut command = on_two(&emulator, &setup, &setup.output("without"));
    without_nccl(&mut command, &setup);
    let says = ["libnccl.so.2", "pip install nvidia-nccl-cu12"];
    fail(command.args(["--transport", "nccl"]), 1, &says);

    let output = setup.output("shared");
    let mut command = on_gpus(&emulator, &setup, &output, "0,0", PLAIN);
    let says = ["CUDA device 0 more than once", "--transport"];
    fail(command.args(["--transport", "nccl"]), 2, &says);
}

#[test]
fn gpus_that_do_not_reach_each_other() {
    let Some(emulator) = emulator() else { return };
    let setup = short();
    let alone = run_on_gpus(&emulator, &setup, &setup.output("alone"), "0", PLAIN);
    let output = setup.output("apart");
    let mut command = on_two(&emulator, &setup, &output);
    command.env("EMULATOR_PEERS", "0");
    let ended = succeed(command.args(["--transport", "p2p"]));
    let said = "through host memory where GPUs do not reach each other";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    Outcome::read(&output).assert_equals(&alone, "without peer access");
}

#[test]
fn copies_that_never_arrive_are_done_without() {
    let Some(emulator) = emulator() else { return };
    let setup = short();
    let alone = run_on_gpus(&emulator, &setup, &setup.output("alone"), "0", PLAIN);
    let output = setup.output("hung");
    let mut command = on_two(&emulator, &setup, &output);
    let ended = succeed(command.env("EMULATOR_FAIL", "peer_copy_hang"));
    let said = "travel by host memory, because a copy from GPU 0 to GPU 1 did not arrive";
    assert!(ended.stderr.contains(said), "{}", ended.stderr);
    Outcome::read(&output).assert_equals(&alone, "through host memory");
}
