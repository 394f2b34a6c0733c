//! How fast everything around the step is: loading, tokenising, making micro-batches, saving.
//!
//! `scripts/measure_io.sh` runs it. What is compared is measured in turn, in one process, several times; the
//! figures are medians with the lowest and the highest. Nothing here can fail by being slow.
#![allow(clippy::unwrap_used)]

mod batches;
mod figures;
mod loading;
mod saving;
mod tokenising;

use std::path::PathBuf;

use figures::Report;

fn main() {
    let mut runs = 5;
    let mut out: Option<PathBuf> = None;
    let mut parts: Vec<String> = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| usage(&argument));
        match argument.as_str() {
            // What cargo gives to every bench.
            "--bench" => {}
            "--runs" => runs = value().parse().unwrap_or_else(|_| usage("--runs")),
            "--out" => out = Some(value().into()),
            "loading" | "conversions" | "tokenising" | "batches" | "saving" => parts.push(argument),
            other => usage(other),
        }
    }
    let asked = |part: &str| parts.is_empty() || parts.iter().any(|asked| asked == part);
    let folder = tempfile::tempdir().unwrap();
    let threads = std::thread::available_parallelism().unwrap().get();
    let mut report = Report::new(runs, threads);
    if asked("loading") {
        loading::stages(&mut report, folder.path());
    }
    if asked("conversions") {
        loading::conversions(&mut report);
    }
    if asked("tokenising") {
        tokenising::rows(&mut report, folder.path());
    }
    if asked("batches") {
        batches::made(&mut report, folder.path());
    }
    if asked("saving") {
        saving::steps(&mut report, folder.path());
    }
    print!("{}", report.tables());
    if let Some(path) = out {
        report.write(&path);
    }
}

fn usage(about: &str) -> ! {
    eprintln!(
        "{about}? usage: io [--runs N] [--out FILE] [loading|conversions|tokenising|batches|saving ...]"
    );
    std::process::exit(2)
}
