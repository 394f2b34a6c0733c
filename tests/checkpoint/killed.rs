//! A process that does nothing but save is killed with SIGKILL again and again; what it leaves must
//! always load, belong together, and never be older than before.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use mp_train::checkpoint::HostTensor;
use mp_train::checkpoint::run_state::{
    latest_checkpoint, read_json, read_tensors, save_checkpoint, verify_checkpoint, write_json,
    write_tensors,
};
use tempfile::tempdir;

use crate::Random;

const FOLDER_VARIABLE: &str = "MP_TRAIN_TEST_SAVE_INTO";
const TRIES: usize = 60;
const KEPT: usize = 2;
const FILES: usize = 40;

/// What a checkpoint of `step` holds: every number in it follows from the step, every third is large.
fn tensors_of(step: u64) -> BTreeMap<String, HostTensor> {
    let count = if step.is_multiple_of(3) {
        1_000_000
    } else {
        500
    };
    let values = vec![step as f32; count];
    let weights = HostTensor::from_f32([count], &values).unwrap();
    let position = HostTensor::from_i64([1], &[step as i64]).unwrap();
    BTreeMap::from([("weights".into(), weights), ("position".into(), position)])
}

fn save(output: &Path, step: u64) {
    save_checkpoint(output, step, KEPT, |folder| {
        let tensors = tensors_of(step);
        write_tensors(&folder.join("optimizer.safetensors"), &tensors)?;
        // Many files, so that writing and deleting a folder take their time.
        for part in 0..FILES {
            fs::write(
                folder.join(format!("part-{part}")),
                vec![step as u8; 10_000],
            )
            .unwrap();
        }
        write_json(&folder.join("trainer_state.json"), &step)
    })
    .unwrap();
}

/// The step of the newest checkpoint, after checking that everything in it is of that step.
fn check(output: &Path) -> u64 {
    let latest = latest_checkpoint(output).unwrap();
    assert!(latest.skipped.is_empty(), "torn: {:?}", latest.skipped);
    let (Some(folder), Some(step)) = (latest.path, latest.step) else {
        return 0;
    };
    assert_eq!(
        read_json::<u64>(&folder.join("trainer_state.json")).unwrap(),
        step
    );
    let tensors = read_tensors(&folder.join("optimizer.safetensors")).unwrap();
    assert!(
        tensors == tensors_of(step),
        "the tensors of step {step} are not its own"
    );
    step
}

/// Not a test of its own: the process that `kills_while_saving` starts and kills. Run by hand it has
/// no folder to save into and ends at once.
#[test]
#[ignore = "the child process of kills_while_saving"]
fn child_that_saves_for_ever() {
    let Some(output) = env::var_os(FOLDER_VARIABLE) else {
        return;
    };
    let output = Path::new(&output);
    println!("saving");
    for step in check(output) + 1.. {
        save(output, step);
        if step.is_multiple_of(2) {
            save(output, step);
        }
    }
}

#[test]
fn kills_while_saving() {
    let root = tempdir().unwrap();
    let output = root.path().join("run");
    let mut random = Random(7);
    let mut newest = 0;
    let mut interrupted = 0;
    for attempt in 0..TRIES {
        let mut child = Command::new(env::current_exe().unwrap())
            .args([
                "--exact",
                "killed::child_that_saves_for_ever",
                "--ignored",
                "--nocapture",
            ])
            .env(FOLDER_VARIABLE, &output)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(
            said.any(|line| line.unwrap().contains("saving")),
            "the child did not start"
        );
        sleep(Duration::from_micros(random.below(80_000) as u64));
        if attempt % 10 == 0 {
            // However slow the machine, the run gets on.
            while checkpoints(&output).iter().all(|&(step, _)| step <= newest) {
                assert!(
                    child.try_wait().unwrap().is_none(),
                    "the child ended by itself"
                );
                sleep(Duration::from_millis(1));
            }
        }
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(9),
            "{status}"
        );

        let hidden = |entry: fs::DirEntry| entry.file_name().to_string_lossy().starts_with('.');
        let mut entries = fs::read_dir(&output)
            .into_iter()
            .flatten()
            .map(Result::unwrap);
        interrupted += usize::from(entries.any(hidden));
        for (_, folder) in checkpoints(&output) {
            let verdict = verify_checkpoint(&folder);
            assert!(verdict.is_ok(), "torn: {}", verdict.unwrap_err());
        }
        let found = check(&output);
        assert!(found >= newest, "went back from {newest} to {found}");
        newest = found;
    }
    assert!(
        newest >= TRIES as u64 / 10,
        "only {newest} steps in {TRIES} tries"
    );
    assert!(interrupted > 0, "no kill came in the middle of a save");

    save(&output, newest + 1);
    let mut left: Vec<_> = fs::read_dir(&output)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort_by_key(|name| name.len());
    assert_eq!(left.len(), KEPT, "{left:?}");
    assert!(
        left.iter().all(|name| name.starts_with("checkpoint-")),
        "{left:?}"
    );
}

/// The checkpoints of a run, by their names alone.
fn checkpoints(output: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(output).into_iter().flatten();
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let step = entry
                .file_name()
                .to_str()?
                .strip_prefix("checkpoint-")?
                .parse()
                .ok()?;
            Some((step, entry.path()))
        })
        .collect()
}
