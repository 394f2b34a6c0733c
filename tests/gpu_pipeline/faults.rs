//! GPUs and ranks that fail, hang or compute nonsense: how the run ends, and how it goes on.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use mp_train::checkpoint::run_state::verify_checkpoint;

use super::cuda_emulator::Emulator;
use super::gpu::{PLAIN, emulator, half, on_gpus, run_on_gpus};
use super::outcome::{Outcome, checkpoints, metrics};
use super::program::{Ended, run, succeed};
use super::setup::Setup;

/// Seconds of silence that count as a hang: far beyond what a step takes here.
const BOUND: u64 = 5;
/// What a hang may cost beside that.
const BESIDE: u64 = 10;

const STEPS: usize = 4;

/// Four steps with a checkpoint after the second and the fourth.
fn setup() -> Setup {
    let mut setup = half("lora_train");
    setup.set_steps(STEPS);
    setup.set("--save-steps", "2");
    setup.set("--stall-timeout", &BOUND.to_string());
    setup
}

/// A run on two GPUs with a planned failure.
fn failing(
    emulator: &Emulator,
    setup: &Setup,
    output: &Path,
    transport: &str,
    fault: &str,
) -> Ended {
    let manner = [("EMULATOR_DEVICES", "2"), ("EMULATOR_FAIL", fault)];
    let mut command = on_gpus(emulator, setup, output, "0,1", &manner);
    run(command.args(["--transport", transport]))
}

/// The time from the last step that was done to now.
fn since_last_step(output: &Path) -> Duration {
    let written = std::fs::metadata(output.join("metrics.jsonl")).unwrap();
    let age = SystemTime::now().duration_since(written.modified().unwrap());
    age.unwrap()
}

/// The error that a run ended with.
fn error(ended: &Ended) -> &str {
    let mut lines = ended.stderr.lines();
    let error = lines.find(|line| line.starts_with("error: "));
    error.unwrap_or_else(|| panic!("{}", ended.stderr))
}

/// The checkpoint that the last line names.
fn named(ended: &Ended) -> PathBuf {
    let last = ended.stderr.lines().last().unwrap();
    let named = last.strip_prefix("resume with --resume ");
    named.unwrap_or_else(|| panic!("{}", ended.stderr)).into()
}

/// A failure in the third step, and what is said of it. Two micro-batches go through in every step, and two
/// in the rehearsal before the first.
struct Fault {
    transport: &'static str,
    plan: &'static str,
    says: &'static [&'static str],
}

const fn fault(
    transport: &'static str,
    plan: &'static str,
    says: &'static [&'static str],
) -> Fault {
    Fault {
        transport,
        plan,
        says,
    }
}

/// Runs into each of them: it ends in time, with exit code 1, and the checkpoint it names is whole. Goes on
/// from there after the last, as if nothing had been.
fn third_step_fails(faults: &[Fault]) {
    let Some(emulator) = emulator() else { return };
    let setup = setup();
    let alone = run_on_gpus(&emulator, &setup, &setup.output("alone"), "0", PLAIN);
    for (index, fault) in faults.iter().enumerate() {
        let output = setup.output(&index.to_string());
        let ended = failing(&emulator, &setup, &output, fault.transport, fault.plan);
        let took = since_last_step(&output);
        let what = format!("{}: {}", fault.plan, ended.stderr);
        assert_eq!(ended.code, Some(1), "{what}");
        for said in fault.says {
            assert!(error(&ended).contains(said), "no {said:?} in {what}");
        }
        assert_eq!(metrics(&output).len(), 2, "{what}");
        assert!(took.as_secs() < BOUND + BESIDE, "{took:?} {what}");
        let checkpoint = named(&ended);
        assert_eq!(checkpoint, output.join("checkpoint-2"), "{what}");
        verify_checkpoint(&checkpoint).unwrap();
        assert_eq!(checkpoints(&output), [2], "{what}");
        if index + 1 == faults.len() {
            let manner = [("EMULATOR_DEVICES", "2")];
            let mut command = on_gpus(&emulator, &setup, &output, "0,1", &manner);
            succeed(command.arg("--resume").arg(checkpoint));
            Outcome::read(&output).assert_equals(&alone, "after a failure");
        }
    }
}

const DEVICE: &str = "no sign of life for 5 s: the device does not finish what it is at";
const THREAD: &str = "no sign of life for 5 s: its thread does not come back from a call";

#[test]
fn a_gpu_hangs_beside_peer_copies() {
    third_step_fails(&[
        fault(
            "p2p",
            "gpu_hang:embed:8@0",
            &["stage 0, step 3, F1 on CUDA device 0", DEVICE],
        ),
        fault(
            "p2p",
            "gpu_hang:cross_entropy:7@1",
            &["stage 1, step 3, F0 on CUDA device 1", DEVICE],
        ),
        fault(
            "p2p",
            "gpu_hang:square_sums:3@1",
            &["stage 1, step 3, update", DEVICE],
        ),
    ]);
}

#[test]
fn a_gpu_hangs_beside_nccl() {
    third_step_fails(&[
        fault(
            "nccl",
            "gpu_hang:cross_entropy:8@1",
            &["stage 1, step 3, F1 on CUDA device 1", DEVICE],
        ),
        fault(
            "nccl",
            "gpu_hang:embed:7@0",
            &["stage 0, step 3, F0 on CUDA device 0", DEVICE],
        ),
    ]);
}

#[test]
fn a_thread_hangs_in_the_driver() {
    third_step_fails(&[
        fault(
            "p2p",
            "host_hang:cross_entropy:7@1",
            &["stage 1, step 3, F0 on CUDA device 1", THREAD],
        ),
        fault(
            "nccl",
            "host_hang:square_sums:3@0",
            &["stage 0, step 3, update", THREAD],
        ),
        fault(
            "nccl",
            "host_hang:embed:8@0",
            &["stage 0, step 3, F1 on CUDA device 0", THREAD],
        ),
    ]);
}

#[test]
fn a_kernel_fails_on_one_gpu() {
    third_step_fails(&[
        fault(
            "nccl",
            "launch:cross_entropy:7@1",
            &["stage 1, step 3, F0 on CUDA device 1"],
        ),
        fault(
            "p2p",
            "launch:embed:8@0",
            &["stage 0, step 3, F1 on CUDA device 0"],
        ),
        fault(
            "nccl",
            "launch:square_sums:3@0",
            &["stage 0, step 3, update on CUDA device 0"],
        ),
    ]);
}

#[test]
fn nccl_fails_or_hangs() {
    third_step_fails(&[
        fault("nccl", "nccl_error:23@1", &["stage 1, step 3", "NCCL"]),
        fault("nccl", "nccl_error:23@0", &["stage 0, step 3", "NCCL"]),
        fault(
            "nccl",
            "nccl_hang:23@1",
            &["step 3", "no sign of life for 5 s"],
        ),
    ]);
}

#[test]
fn what_hangs_before_the_first_step_leaves_nothing_to_resume() {
    let Some(emulator) = emulator() else { return };
    let setup = setup();
    for (index, (plan, place)) in [
        ("nccl_init_hang@1", ", connecting on CUDA device "),
        (
            "gpu_hang:embed:1@0",
            "stage 0, rehearsal, F0 on CUDA device 0: ",
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let output = setup.output(&index.to_string());
        let ended = failing(&emulator, &setup, &output, "nccl", plan);
        assert_eq!(ended.code, Some(1), "{}", ended.stderr);
        for said in [place, "no sign of life for 5 s"] {
            assert!(error(&ended).contains(said), "{}", ended.stderr);
        }
        let last = ended.stderr.lines().last().unwrap();
        let folder = output.display();
        let nothing = format!("there is no checkpoint in {folder} yet to resume from");
        assert_eq!(last, nothing);
    }
}

#[test]
fn memory_runs_out_on_one_gpu() {
    let Some(emulator) = emulator() else { return };
    let setup = setup();
    for (fault, code, says) in [
        // Known before anything is loaded.
        (
            "out_of_memory_after:1500000@1",
            2,
            ["stage 1 on device 1 needs", "are missing"],
        ),
        // Taken by somebody else between plan and start.
        (
            "allocation:1@1",
            1,
            ["stage 1, loading on CUDA device 1", "no memory for"],
        ),
    ] {
        let output = setup.output(&code.to_string());
        let ended = failing(&emulator, &setup, &output, "nccl", fault);
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        for said in says {
            assert!(error(&ended).contains(said), "{}", ended.stderr);
        }
    }
}

#[test]
fn no_number_on_one_gpu_once_costs_one_step() {
    let Some(emulator) = emulator() else { return };
    let setup = setup();
    for (index, plan) in ["nan:embed:5@0", "nan:attention_forward_16:9@1"]
        .iter()
        .enumerate()
    {
        let output = setup.output(&index.to_string());
        let ended = failing(&emulator, &setup, &output, "nccl", plan);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let rows = metrics(&output);
        let skipped: Vec<bool> = rows.iter().map(|row| row["skipped"] == true).collect();
        assert_eq!(skipped, [false, true, false, false], "{plan}");
        for row in [&rows[0], &rows[2], &rows[3]] {
            assert!(row["loss"].as_f64().is_some_and(f64::is_finite), "{row}");
        }
    }
}

#[test]
fn no_number_on_one_gpu_for_good_ends_the_run() {
    let Some(emulator) = emulator() else { return };
    let mut setup = setup();
    setup.set_steps(9);
    setup.set("--max-skipped-steps", "2");
    for (index, plan) in ["nan:embed:7+@0", "nan:cross_entropy:7+@1"]
        .iter()
        .enumerate()
    {
        let output = setup.output(&index.to_string());
        let ended = failing(&emulator, &setup, &output, "p2p", plan);
        assert_eq!(ended.code, Some(3), "{}", ended.stderr);
        assert!(
            error(&ended).contains("training diverged at step 4"),
            "{}",
            ended.stderr
        );
        assert_eq!(named(&ended), output.join("checkpoint-2"));
        assert!(output.join("diverged_batch.jsonl").is_file());
    }
}
