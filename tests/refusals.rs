//! Wrong input of every kind, put to the program: the whole of what it says, its exit code and what
//! it leaves behind stand in `tests/refusals/expected.txt`.
//!
//! `UPDATE_SNAPSHOTS=1 cargo test --release --test refusals` writes that file anew; read the
//! difference before you keep it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

#[path = "refusals/cases.rs"]
mod cases;
#[path = "text_run/model.rs"]
mod model;
#[path = "refusals/world.rs"]
mod world;

use cases::{CASES, Case};
use world::World;

/// Far beyond what a refusal takes, so that only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(60);

/// What follows the name of each kind of command.
const TRAIN: &str = "--model model --train rows.jsonl";
const TEXT: &str =
    "--model text_model --train alpaca.jsonl --max-source-length 64 --max-target-length 64";
const RUN: &str = "--output output --max-steps 2 --threads 1 --quiet";

fn arguments(case: &Case) -> String {
    case.command
        .replace("{train}", &format!("{TRAIN} {RUN}"))
        .replace("{text}", &format!("{TEXT} {RUN}"))
        .replace("{run}", RUN)
}

/// The command in a shell that lets no file grow beyond `blocks` of 512 bytes.
fn command(case: &Case, world: &World) -> Command {
    let program = env!("CARGO_BIN_EXE_mp-train");
    let mut command = match case.file_blocks {
        Some(blocks) => {
            let mut shell = Command::new("sh");
            let script = r#"trap '' XFSZ; ulimit -f "$0"; exec "$@""#;
            shell.args(["-c", script, &blocks.to_string(), program]);
            shell
        }
        None => Command::new(program),
    };
    command
        .args(arguments(case).split_whitespace())
        .current_dir(world.path())
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// Exit code and standard error; a command that does not end is killed and fails the test.
fn run(case: &Case, world: &World) -> (Option<i32>, String) {
    let mut child = command(case, world).spawn().unwrap();
    let mut pipe = child.stderr.take().unwrap();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    });
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if started.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("{}: hangs", case.name);
        }
        thread::sleep(Duration::from_millis(2));
    };
    (status.code(), reader.join().unwrap())
}

/// A folder that is being written has the process's number in its name.
fn without_process_ids(text: &str) -> String {
    let mut parts = text.split(".partial-");
    let mut out = parts.next().unwrap().to_owned();
    for part in parts {
        out.push_str(".partial-<process>");
        out.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    out
}

/// Names that a half-written file has.
fn is_half_written(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_string_lossy();
    // A lock says that a file beside it is whole.
    name.starts_with('.') && !name.ends_with(".lock")
        || name.ends_with(".tmp")
        || name.ends_with(".partial")
}

/// Runs a case and writes down what happened; to `problems` goes what must hold in every case and
/// does not.
fn snapshot(case: &Case, problems: &mut Vec<String>) -> String {
    let world = World::new();
    (case.prepare)(&world);
    let before = world.contents();
    let (code, told) = run(case, &world);
    let told = without_process_ids(&told.replace(&world.path().display().to_string(), "<dir>"));
    let after = world.contents();

    let mut must = |holds: bool, what: &str| {
        if !holds {
            problems.push(format!("{}: {what}\n{told}", case.name));
        }
    };
    must(!told.contains("panicked"), "panics");
    let is_told = told.lines().any(|line| line.starts_with("error: "));
    must(is_told, "no line says error");
    must(matches!(code, Some(1..=3)), &format!("exits with {code:?}"));
    for word in case.says {
        must(told.contains(word), &format!("does not say {word:?}"));
    }
    for (path, bytes) in &before {
        must(
            after.get(path) == Some(bytes),
            &format!("{path:?} was changed"),
        );
    }

    let mut text = format!("== {}\n$ mp-train {}\n", case.name, arguments(case));
    text.push_str(told.trim_end());
    text.push_str(&format!("\n[exit {}]\n", code.unwrap_or_default()));
    for path in after.keys().filter(|path| !before.contains_key(*path)) {
        must(
            !is_half_written(path),
            &format!("{path:?} was left half-written"),
        );
        // The rest of this name is the time and the process.
        let shown = path.display().to_string();
        let shown = shown.split(".tfevents.").next().unwrap();
        text.push_str(&format!("[left: {shown}]\n"));
    }
    text
}

#[test]
fn every_wrong_input_is_refused_in_so_many_words() {
    assert!(CASES.len() >= 30);
    let mut problems = Vec::new();
    let found: Vec<_> = CASES
        .iter()
        .map(|case| snapshot(case, &mut problems))
        .collect();
    let found = found.join("\n");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/refusals/expected.txt");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, &found).unwrap();
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let expected = fs::read_to_string(&path).unwrap();
    // One case at a time, so that a failure shows what differs.
    for (found, expected) in found.split("\n== ").zip(expected.split("\n== ")) {
        assert!(
            found == expected,
            "expected:\n{expected}\n\nfound:\n{found}"
        );
    }
    assert!(found == expected, "cases were added or left out");
}
