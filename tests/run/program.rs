//! Starting the program, waiting for it with a limit, and sending it signals.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Far beyond what any run here takes, so that only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(240);

/// How the program ended.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// `mp-train` with arguments.
pub fn mp_train<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mp-train"));
    command.args(arguments).stdin(Stdio::null());
    command
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Ended {
    wait(start(command))
}

/// Runs a command that must succeed.
#[track_caller]
pub fn succeed(command: &mut Command) -> Ended {
    let ended = run(command);
    assert_eq!(ended.code, Some(0), "{command:?}\n{}", ended.stderr);
    ended
}

/// Runs a command that must fail with `code` and say all of `words` on standard error.
#[track_caller]
pub fn fail(command: &mut Command, code: i32, words: &[&str]) -> String {
    let ended = run(command);
    assert_eq!(ended.code, Some(code), "{command:?}\n{}", ended.stderr);
    let is_told = ended.stderr.lines().any(|line| line.starts_with("error: "));
    assert!(is_told, "{}", ended.stderr);
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "no {word:?} in {}",
            ended.stderr
        );
    }
    ended.stderr
}

pub fn start(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

pub fn wait(child: Child) -> Ended {
    let pid = pid(&child);
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let Output {
        status,
        stdout,
        stderr,
    } = receiver.recv_timeout(LIMIT).unwrap_or_else(|_| {
        kill_process(pid, Signal::KILL).unwrap();
        panic!("the program hangs");
    });
    Ended {
        code: status.code(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(stderr).unwrap(),
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed()).unwrap()
}

/// Starts a command, sends it `signal` once `is_time` says so, and waits for its end.
#[track_caller]
pub fn interrupt(command: &mut Command, signal: Signal, is_time: impl Fn() -> bool) -> Ended {
    let mut child = start(command);
    let started = Instant::now();
    while !is_time() {
        assert!(started.elapsed() < LIMIT, "the program gets nowhere");
        if child.try_wait().unwrap().is_some() {
            panic!("ended too early: {:?}", wait(child));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    kill_process(pid(&child), signal).unwrap();
    wait(child)
}

/// Whole lines in a file that may not be there yet.
pub fn lines(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap_or_default();
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}
