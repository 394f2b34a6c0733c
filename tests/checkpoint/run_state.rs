//! Saving, replacing, pruning and finding checkpoints, with every failure that can be staged.

use std::fs;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use mp_train::checkpoint::CheckpointError;
use mp_train::checkpoint::run_state::{
    latest_checkpoint, read_json, save_checkpoint, verify_checkpoint, write_json,
};
use tempfile::tempdir;

use crate::assert_says;

fn save(output: &Path, step: u64, limit: usize) -> Result<PathBuf, CheckpointError> {
    save_checkpoint(output, step, limit, |folder| {
        write_state(folder, step, "first")
    })
}

fn write_state(folder: &Path, step: u64, text: &str) -> Result<(), CheckpointError> {
    fs::create_dir(folder.join("adapter")).unwrap();
    write_json(&folder.join("state.json"), &(step, text))?;
    write_json(&folder.join("adapter/adapter.json"), &vec![step; 100])
}

fn state(folder: &Path) -> (u64, String) {
    read_json(&folder.join("state.json")).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_newest_checkpoints_are_kept() {
    let root = tempdir().unwrap();
    let output = root.path().join("runs/first");
    assert_eq!(latest_checkpoint(&output).unwrap().path, None);
    for step in [2, 10, 9] {
        let path = save(&output, step, 2).unwrap();
        assert_eq!(path, output.join(format!("checkpoint-{step}")));
        let manifest = verify_checkpoint(&path).unwrap();
        assert_eq!(manifest.step, step);
        let files: Vec<_> = manifest
            .files
            .iter()
            .map(|file| file.name.as_str())
            .collect();
        assert_eq!(files, ["adapter/adapter.json", "state.json"]);
    }
    assert_eq!(names(&output), ["checkpoint-10", "checkpoint-9"]);
    let latest = latest_checkpoint(&output).unwrap();
    assert_eq!(
        (latest.step, latest.path),
        (Some(10), Some(output.join("checkpoint-10")))
    );
    assert!(latest.skipped.is_empty());

    // Gone back to an earlier state: what was just saved stays, whatever else is there.
    save(&output, 3, 1).unwrap();
    assert_eq!(names(&output), ["checkpoint-3"]);
    for step in 4..9 {
        save(&output, step, 0).unwrap();
    }
    assert_eq!(names(&output).len(), 6, "0 keeps all");
}

#[test]
fn other_things_in_the_output_folder_are_left_alone() {
    let root = tempdir().unwrap();
    let output = root.path();
    for name in [
        "checkpoint-007",
        "checkpoint-x",
        "checkpoint-",
        "logs",
        ".checkpoint-3.mine-1",
    ] {
        fs::create_dir(output.join(name)).unwrap();
    }
    fs::write(output.join("checkpoint-99"), "a file").unwrap();
    let before = names(output);
    save(output, 1, 1).unwrap();
    save(output, 2, 1).unwrap();
    let mut expected = [before, vec!["checkpoint-2".to_owned()]].concat();
    expected.sort();
    assert_eq!(names(output), expected);
    assert_eq!(latest_checkpoint(output).unwrap().step, Some(2));
    let file = output.join("checkpoint-99");
    assert_says(
        save(output, 99, 1),
        &file,
        "choose another folder or move the file away",
    );
    assert_eq!(names(output), expected);
}

#[test]
fn saving_a_step_again_replaces_it() {
    let root = tempdir().unwrap();
    let output = root.path();
    save(output, 5, 2).unwrap();
    save_checkpoint(output, 5, 2, |folder| write_state(folder, 5, "second")).unwrap();
    assert_eq!(names(output), ["checkpoint-5"]);
    assert_eq!(
        state(&output.join("checkpoint-5")),
        (5, "second".to_owned())
    );
}

#[test]
fn a_full_disk_leaves_the_old_checkpoints_and_no_rubbish() {
    let root = tempdir().unwrap();
    let output = root.path();
    save(output, 1, 2).unwrap();
    let full = |folder: &Path| {
        fs::write(folder.join("half.bin"), [0; 4096]).unwrap();
        // The real error of the system, from a device that is always full.
        let cause = fs::File::options().write(true).open("/dev/full");
        let cause = cause
            .and_then(|mut full| full.write_all(&[0; 64]))
            .unwrap_err();
        let path = folder.join("half.bin");
        Err(CheckpointError::Write { path, cause })
    };
    for step in [1, 2] {
        let result = save_checkpoint(output, step, 2, full);
        let partial = format!(".checkpoint-{step}.partial-{}/half.bin", std::process::id());
        assert_says(result, &output.join(partial), "lower save_total_limit");
        assert_eq!(names(output), ["checkpoint-1"]);
        assert_eq!(latest_checkpoint(output).unwrap().step, Some(1));
    }
    let kinds = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
    for kind in kinds {
        let path = output.join("x");
        let error = CheckpointError::Write {
            path,
            cause: kind.into(),
        };
        assert!(
            error.to_string().contains("full: free some space"),
            "{error}"
        );
    }
}

#[test]
fn a_panic_while_saving_leaves_no_rubbish() {
    let root = tempdir().unwrap();
    let output = root.path();
    let result = catch_unwind(AssertUnwindSafe(|| {
        save_checkpoint(output, 1, 2, |folder| {
            fs::write(folder.join("a"), "b").unwrap();
            panic!("in the middle")
        })
    }));
    assert!(result.is_err());
    assert!(names(output).is_empty());
    save(output, 1, 2).unwrap();
}

#[test]
fn places_that_cannot_be_written() {
    let root = tempdir().unwrap();
    let file = root.path().join("file");
    fs::write(&file, "").unwrap();
    assert_says(
        save(&file, 1, 0),
        &file,
        "choose another folder or move the file away",
    );
    assert_says(latest_checkpoint(&file), &file, "cannot read");
    let below = file.join("output");
    assert_says(
        save(&below, 1, 0),
        &below,
        "A file stands where a folder is needed",
    );
    let proc = Path::new("/proc/mp-train-output");
    assert_says(save(proc, 1, 0), proc, "cannot write");
    let taken = root.path().join("taken.json");
    fs::create_dir(&taken).unwrap();
    assert_says(write_json(&taken, &1), &taken, "cannot write");
    assert_eq!(names(root.path()), ["file", "taken.json"]);
}

#[test]
fn what_cannot_be_saved_is_refused() {
    let root = tempdir().unwrap();
    let output = root.path();
    let saved = |write: &dyn Fn(&Path)| {
        save_checkpoint(output, 1, 0, |folder| {
            write(folder);
            Ok(())
        })
    };
    assert_says(saved(&|_| ()), output, "must have files");
    assert_says(
        saved(&|f| fs::write(f.join("manifest.json"), "{}").unwrap()),
        output,
        "manifest.json",
    );
    let link = |f: &Path| std::os::unix::fs::symlink("/etc/passwd", f.join("link")).unwrap();
    assert_says(saved(&link), output, "only plain files");
    assert!(names(output).is_empty());
}

#[test]
fn two_runs_do_not_save_into_one_folder_at_once() {
    let root = tempdir().unwrap();
    let output = root.path();
    save_checkpoint(output, 1, 0, |folder| {
        assert_says(save(output, 2, 0), output, "own output folder");
        write_state(folder, 1, "first")
    })
    .unwrap();
    assert_eq!(names(output), ["checkpoint-1"]);
}

#[test]
fn damaged_checkpoints_are_skipped_and_reported() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 9] = [
        ("does not match|do not match its checksum", |c| {
            let path = c.join("adapter/adapter.json");
            let mut bytes = fs::read(&path).unwrap();
            bytes[7] ^= 1;
            fs::write(path, bytes).unwrap();
        }),
        ("has 3 bytes instead of", |c| {
            fs::write(c.join("state.json"), "[1]").unwrap()
        }),
        ("state.json", |c| {
            fs::remove_file(c.join("state.json")).unwrap()
        }),
        ("no manifest.json", |c| {
            fs::remove_file(c.join("manifest.json")).unwrap()
        }),
        ("not the JSON expected", |c| {
            fs::write(c.join("manifest.json"), "{\"step\": 7").unwrap()
        }),
        ("lists no files", |c| {
            write_json(
                &c.join("manifest.json"),
                &serde_json::json!({"step": 7, "files": []}),
            )
            .unwrap()
        }),
        ("outside of it", |c| {
            rewrite(c, "state.json", "../state.json")
        }),
        ("outside of it", |c| rewrite(c, "state.json", "/etc/passwd")),
        ("that of step 8", |c| {
            rewrite(c, "\"step\": 7", "\"step\": 8")
        }),
    ];
    for (part, damage) in damages {
        let root = tempdir().unwrap();
        let output = root.path();
        save(output, 6, 0).unwrap();
        let newest = save(output, 7, 0).unwrap();
        damage(&newest);
        let latest = latest_checkpoint(output).unwrap();
        assert_eq!(latest.step, Some(6), "{part}");
        assert_eq!(latest.skipped.len(), 1);
        let (path, reason) = &latest.skipped[0];
        assert_eq!(path, &newest);
        assert!(
            part.split('|').any(|part| reason.contains(part)),
            "{reason}"
        );
        assert!(reason.contains(newest.to_str().unwrap()), "{reason}");
    }
}

fn rewrite(checkpoint: &Path, from: &str, to: &str) {
    let path = checkpoint.join("manifest.json");
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}

/// The folders as a kill leaves them between any two steps of a save, staged by hand.
#[test]
fn every_moment_of_a_kill_can_be_recovered_from() {
    let root = tempdir().unwrap();
    let output = root.path();
    save(output, 4, 0).unwrap();
    let at = |name: &str| output.join(name);

    // Between the two renames of a replacement: the former one is loaded, then put back.
    fs::rename(at("checkpoint-4"), at(".checkpoint-4.replaced-77")).unwrap();
    let latest = latest_checkpoint(output).unwrap();
    assert_eq!(latest.path, Some(at(".checkpoint-4.replaced-77")));
    assert_eq!(latest.step, Some(4));
    save(output, 3, 0).unwrap();
    assert_eq!(names(output), ["checkpoint-3", "checkpoint-4"]);

    // After the second rename: the new one counts, the former one goes.
    fs::rename(at("checkpoint-3"), at(".checkpoint-4.replaced-77")).unwrap();
    assert_eq!(
        latest_checkpoint(output).unwrap().path,
        Some(at("checkpoint-4"))
    );
    save(output, 5, 0).unwrap();
    assert_eq!(names(output), ["checkpoint-4", "checkpoint-5"]);

    // The new one was damaged since: the former one takes its place again.
    fs::rename(at("checkpoint-5"), at("five")).unwrap();
    save(output, 5, 0).unwrap();
    fs::rename(at("five"), at(".checkpoint-5.replaced-77")).unwrap();
    fs::write(at("checkpoint-5").join("state.json"), "").unwrap();
    let latest = latest_checkpoint(output).unwrap();
    assert_eq!(latest.path, Some(at(".checkpoint-5.replaced-77")));
    assert_eq!(latest.skipped.len(), 1);
    // In the middle of writing, and in the middle of deleting, by this process's number and others.
    let own = std::process::id();
    for leftover in [
        ".checkpoint-6.partial-77".to_owned(),
        format!(".checkpoint-6.partial-{own}"),
        format!(".checkpoint-5.trash-{own}"),
        ".checkpoint-1.trash-77".to_owned(),
    ] {
        fs::create_dir(at(&leftover)).unwrap();
        fs::write(at(&leftover).join("state.json"), "[6]").unwrap();
    }
    assert_eq!(latest_checkpoint(output).unwrap().step, Some(5));
    save(output, 6, 0).unwrap();
    assert_eq!(
        names(output),
        ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    );
    assert_eq!(verify_checkpoint(&at("checkpoint-5")).unwrap().step, 5);
}

#[test]
fn json_is_replaced_whole_or_not_at_all() {
    let root = tempdir().unwrap();
    let path = root.path().join("state.json");
    write_json(&path, &[1, 2]).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "[\n  1,\n  2\n]\n");
    let no_json = std::collections::BTreeMap::from([((1, 2), 3)]);
    assert_says(write_json(&path, &no_json), &path, "key must be a string");
    assert_eq!(read_json::<Vec<i32>>(&path).unwrap(), [1, 2]);
    assert_eq!(names(root.path()), ["state.json"]);
}
