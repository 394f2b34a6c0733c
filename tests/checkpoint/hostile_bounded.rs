//! Each hostile folder is read by a process of its own that may have little memory and is given up
//! after a minute: an error with the right words, no crash, no hang, and a small peak.

use std::env;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use mp_train::config::model::ModelConfig;
use mp_train::data::byte_level::ByteLevel;
use mp_train::data::sentencepiece::SentencePiece;
use mp_train::data::tokenizer::{TokenizerFiles, VocabularyFile};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::tempdir;

use crate::hostile_corpus::{Hostile, all};
use crate::read_model;

const FOLDER_VARIABLE: &str = "MP_TRAIN_TEST_READ_FROM";

/// Address space of the process that reads; a bomb that goes off is an abort.
const ADDRESS_SPACE: u64 = 1 << 30;
/// The most memory it may have had at once, in KiB. What it needs by itself is about 10 MiB.
const PEAK_KIB: u64 = 200 << 10;
/// No measure of speed: by then it hangs.
const GIVEN_UP_AFTER: Duration = Duration::from_secs(60);

/// What the child says of the folder, and its peak in KiB.
fn read_in_child(folder: &Path) -> (String, u64) {
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "hostile_bounded::child_that_reads"])
        .args(["--ignored", "--nocapture", "--test-threads=1"])
        .env(FOLDER_VARIABLE, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let end = Instant::now() + GIVEN_UP_AFTER;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            return ("it hangs".to_owned(), 0);
        }
        sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let line = |lead: &str| text.lines().find_map(|line| line.strip_prefix(lead));
    match (line("SAID "), line("PEAK ")) {
        (Some(said), Some(peak)) if output.status.success() => {
            (said.to_owned(), peak.parse().unwrap())
        }
        _ => {
            let errors = String::from_utf8_lossy(&output.stderr);
            (format!("it died, {}: {errors}", output.status), 0)
        }
    }
}

fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let digits = line.unwrap().trim().trim_end_matches(" kB");
    digits.parse().unwrap()
}

/// Reads whatever the folder is, as a run would.
fn read(folder: &Path) -> Result<(), String> {
    fn said<T>(result: Result<T, impl Error>) -> Result<(), String> {
        result.map(drop).map_err(|error| match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        })
    }
    let has = |name: &str| folder.join(name).symlink_metadata().is_ok();
    if has("config.json") {
        said(ModelConfig::from_json_file(&folder.join("config.json")))
    } else if has("tokenizer.model") || has("tokenizer.json") {
        let files = TokenizerFiles::read(folder).map_err(|error| error.to_string())?;
        match files.vocabulary {
            VocabularyFile::SentencePiece(proto) => said(SentencePiece::new(proto)),
            VocabularyFile::ByteLevel(tokens) => said(ByteLevel::new(tokens)),
        }
    } else {
        said(read_model(folder))
    }
}

/// Not a test of its own: the process that `hostile_folders_are_refused_in_bounds` starts.
#[test]
#[ignore = "the child process of hostile_folders_are_refused_in_bounds"]
fn child_that_reads() {
    let Some(folder) = env::var_os(FOLDER_VARIABLE) else {
        return;
    };
    let limit = Rlimit {
        current: Some(ADDRESS_SPACE),
        ..getrlimit(Resource::As)
    };
    setrlimit(Resource::As, limit).unwrap();
    let said = match read(Path::new(&folder)) {
        Ok(()) => "nothing".to_owned(),
        Err(text) => text.replace('\n', " "),
    };
    println!("\nSAID {said}\nPEAK {}", peak_kib());
}

#[test]
fn hostile_folders_are_refused_in_bounds() {
    let outside = tempdir().unwrap();
    let mut wrong = Vec::new();
    let mut highest = 0;
    let all = all();
    for case in &all {
        let Hostile { name, says, .. } = case;
        let folder = outside.path().join("model");
        fs::create_dir_all(outside.path().join("outside")).unwrap();
        fs::create_dir(&folder).unwrap();
        let golden = crate::golden_path("model/model.safetensors");
        fs::copy(golden, outside.path().join("outside/model.safetensors")).unwrap();
        case.make(&folder);
        let (said, peak) = read_in_child(&folder);
        if !said.contains(says) || !(said.contains("/model") || said.contains("vocabulary")) {
            wrong.push(format!("{name}: {said}\n    does not say '{says}'"));
        }
        if peak > PEAK_KIB {
            wrong.push(format!("{name}: a peak of {peak} KiB"));
        }
        highest = highest.max(peak);
        fs::remove_dir_all(&folder).unwrap();
    }
    assert!(!Path::new("was-here").exists());
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        all.len(),
        wrong.join("\n")
    );
    assert!(all.len() >= 80, "{} folders", all.len());
    println!("{} folders, highest peak {highest} KiB", all.len());
}

/// The bounds of the test above would be worth nothing if they let anything pass.
#[test]
fn the_bounds_are_there() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("good"), "").unwrap();
    let (said, peak) = read_in_child(folder.path());
    assert!(said.contains("holds no weights"), "{said}");
    assert!(peak > 1000, "{peak}");
}
