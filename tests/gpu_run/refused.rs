//! GPUs that are not there, libraries that are missing, runs that fail: the whole of what the program
//! says, its exit code and what it leaves behind stand in `tests/gpu_run/expected.txt`.
//!
//! `UPDATE_SNAPSHOTS=1 cargo test --release --test gpu_run refused` writes that file anew; read the
//! difference before you keep it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::cases::{CASES, Case, LIBRARIES};
use super::cuda_emulator::Emulator;
use super::gpu::emulator;
use super::program::{mp_train, run};
use super::world::World;

/// What follows the name of each kind of command.
const TRAIN: &str = "--model model --train rows.jsonl --output output --max-steps 2 \
                     --gradient-accumulation 1 --quiet";

fn arguments(case: &Case) -> String {
    case.command.replace("{train}", TRAIN)
}

/// The command, which finds no CUDA library but the case's.
fn command(case: &Case, world: &World, emulator: &Emulator) -> Command {
    let libraries = world.path().join("libraries");
    let mut command = mp_train(arguments(case).split_whitespace());
    emulator.command_env(&mut command);
    command
        .current_dir(world.path())
        .env("LD_LIBRARY_PATH", libraries)
        .env("HOME", world.path().join("home"))
        .env("NO_COLOR", "1")
        .env("EMULATOR_QUIET", "1");
    for name in ["MP_TRAIN_CUDA_LIBRARIES", "VIRTUAL_ENV", "CONDA_PREFIX"] {
        command.env_remove(name);
    }
    for (name, value) in case.manner {
        // All of mp-train's own name files or folders, but for the architecture.
        match name.starts_with("MP_TRAIN_") && *name != "MP_TRAIN_KERNEL_ARCH" {
            true => command.env(name, world.path().join(value)),
            false => command.env(name, value),
        };
    }
    command
}

/// Whether the machine has a library of its own that the program finds.
fn machine_has(library: &str) -> bool {
    let known = Command::new("/sbin/ldconfig").arg("-p").output();
    let known = known.map(|output| String::from_utf8_lossy(&output.stdout).contains(library));
    let folders = [
        "/usr/local/cuda*/lib64",
        "/usr*/lib/python3*/*-packages/nvidia/*/lib",
        "/usr/local/lib/python3*/*-packages/nvidia/*/lib",
    ];
    let mut found = folders.iter().flat_map(|folder| {
        let pattern = format!("{folder}/{library}*");
        glob::glob(&pattern).unwrap().flatten()
    });
    known.unwrap_or(false) || found.next().is_some()
}

/// The part of a compiler's log that does not depend on the compiler.
fn without_log(text: &str) -> String {
    let Some(start) = text.find(" does not compile for ") else {
        return text.to_owned();
    };
    let end = start + text[start..].find('\n').unwrap();
    let lines = text[end..].lines();
    let errors = lines.filter(|line| line.contains("#error"));
    format!("{}\n<log with {}>\n", &text[..end], errors.count().min(1))
}

/// Runs a case and writes down what happened; to `problems` goes what must hold in every case and
/// does not.
fn snapshot(case: &Case, emulator: &Emulator, problems: &mut Vec<String>) -> String {
    let world = World::new();
    let libraries = world.path().join("libraries");
    fs::create_dir(&libraries).unwrap();
    for library in case.libraries {
        for entry in fs::read_dir(emulator.folder()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap();
            if name.to_str().unwrap().starts_with(library) {
                symlink(&path, libraries.join(name)).unwrap();
            }
        }
    }
    world.write("prompts.jsonl", "{\"input_ids\": [5, 191, 194]}\n");
    (case.prepare)(&world);
    let before = world.contents();
    let ended = run(&mut command(case, &world, emulator));
    let folder = world.path().display().to_string();
    let told = without_log(&ended.stderr.replace(&folder, "<dir>"));
    let after = world.contents();

    let mut must = |holds: bool, what: &str| {
        if !holds {
            problems.push(format!("{}: {what}\n{}{told}", case.name, ended.stdout));
        }
    };
    must(!ended.stderr.contains("panicked"), "panics");
    let is_told = ended.stderr.lines().any(|line| line.starts_with("error: "));
    must(
        is_told == (case.code != 0),
        "exit code and error do not fit",
    );
    must(
        ended.code == Some(case.code),
        &format!("exits with {:?}", ended.code),
    );
    for word in case.says {
        let says = told.contains(word) || ended.stdout.contains(word);
        must(says, &format!("does not say {word:?}"));
    }
    for (path, bytes) in &before {
        must(
            after.get(path) == Some(bytes),
            &format!("{path:?} was changed"),
        );
    }

    let mut text = format!("== {}\n", case.name);
    for (name, value) in case.manner {
        text.push_str(&format!("{name}={value} "));
    }
    text.push_str(&format!("$ mp-train {}\n", arguments(case)));
    for said in [&ended.stdout, &told] {
        if !said.is_empty() {
            text.push_str(&format!("{}\n", said.trim_end()));
        }
    }
    text.push_str(&format!("[exit {}]\n", ended.code.unwrap_or_default()));
    // What the pretend driver unpacks beside itself is none of the program's.
    let is_new = |path: &&PathBuf| !before.contains_key(*path) && !path.starts_with("libraries");
    for path in after.keys().filter(is_new) {
        let name = path.file_name().unwrap().to_string_lossy();
        let is_half_written =
            name.starts_with('.') || name.ends_with(".tmp") || name.ends_with(".new");
        must(!is_half_written, &format!("{path:?} was left half-written"));
        // The rest of this name is the time and the process.
        let shown = path.display().to_string();
        let shown = shown.split(".tfevents.").next().unwrap();
        text.push_str(&format!("[left: {shown}]\n"));
    }
    text
}

#[test]
fn whatever_is_wrong_with_a_gpu_is_told_in_so_many_words() {
    let Some(emulator) = emulator() else { return };
    let present: Vec<&str> = LIBRARIES
        .into_iter()
        .filter(|name| machine_has(name))
        .collect();
    // A library of the machine's own stands in for one that is taken away.
    let is_possible = |case: &Case| {
        let found = |name: &&str| present.contains(name) && !case.libraries.contains(name);
        !LIBRARIES.iter().any(found)
    };
    let mut problems = Vec::new();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu_run/expected.txt");
    let (possible, left_out): (Vec<_>, Vec<_>) = CASES.iter().partition(|case| is_possible(case));
    let found: Vec<String> = possible
        .iter()
        .map(|case| snapshot(case, &emulator, &mut problems))
        .collect();
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        assert!(left_out.is_empty(), "this machine has CUDA libraries");
        fs::write(&path, found.join("\n")).unwrap();
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let expected = fs::read_to_string(&path).unwrap();
    let mut expected: Vec<String> = expected
        .split("\n== ")
        .map(|case| format!("== {}\n", case.trim_start_matches("== ").trim_end()))
        .collect();
    let names = left_out.iter().map(|case| format!("== {}\n", case.name));
    let names: Vec<String> = names.collect();
    expected.retain(|case| !names.iter().any(|name| case.starts_with(name)));
    // One case at a time, so that a failure shows what differs.
    for (found, expected) in found.iter().zip(&expected) {
        assert!(
            found == expected,
            "expected:\n{expected}\n\nfound:\n{found}"
        );
    }
    assert_eq!(found.len(), expected.len(), "cases were added or left out");
}
