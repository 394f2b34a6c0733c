//! What kernels ask of device memory, counted on an emulated GPU, against what their op cannot do
//! without. Nothing varies, so the counts are on record: tests/cuda_emulator/traffic.json.
//! `UPDATE_SNAPSHOTS=1 cargo test --test kernel_traffic` writes them anew.

#![allow(clippy::unwrap_used)]

mod cuda_emulator;
mod op_cases;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use cuda_emulator::{Emulator, Loaded};
use mp_train::backend::Backend;
use mp_train::backend::cuda::Cuda;
use op_cases::{Bound, Case, Sizes, Work};
use serde::Serialize;

/// The generation counted: an RTX 3090. Newer ones run the same code.
const ARCH: &str = "86";

/// More than this of the minimum needs a reason.
const NEARLY_ALL: f64 = 1.02;

/// The counts, with what they depend on.
#[derive(Serialize)]
struct Record {
    /// Major version of g++: another may keep a value in a register that this one loads again.
    compiler: String,
    arch: &'static str,
    sizes: Sizes,
    ops: Vec<Counted>,
}

#[derive(Serialize)]
struct Counted {
    op: String,
    minimum: Work,
    /// Bytes asked for, over those of the minimum.
    requested: f64,
    /// Bytes of the pieces of 32 that each kernel touched, over the minimum.
    touched: f64,
    #[serde(skip_serializing_if = "str::is_empty")]
    note: &'static str,
    kernels: Vec<KernelTraffic>,
}

/// Bytes, of all launches of the op together.
#[derive(Serialize)]
struct KernelTraffic {
    kernel: String,
    launches: i64,
    requested_read: i64,
    requested_written: i64,
    touched_read: i64,
    touched_written: i64,
}

/// Tells the child that it is the one that counts: kernels are compiled for that in its whole process.
const COUNTS: (&str, &str) = ("EMULATOR_SANITIZE", "traffic");

#[test]
fn kernels_move_what_is_on_record() {
    if cuda_emulator::on_this_gpu() {
        return;
    }
    let Some(emulator) = Emulator::build() else {
        return;
    };
    if std::env::var(COUNTS.0).is_ok_and(|value| value == COUNTS.1) {
        return compare(&record(emulator.load_here()));
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kernels_move_what_is_on_record", "--nocapture"])
        .env(COUNTS.0, COUNTS.1)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{said}");
}

fn record(emulator: &Loaded) -> Record {
    emulator.set("EMULATOR_ARCH", ARCH);
    let cuda = Cuda::new(0).unwrap();
    let sizes = Sizes::TRAFFIC;
    let mut ops = Vec::new();
    op_cases::visit(&cuda, &sizes, &[(1, sizes.rows)], &mut |cuda, mut case| {
        // The products themselves are cuBLASLt's.
        if case.bound != Bound::Products {
            ops.push(counted(emulator, cuda, &mut case));
        }
    });
    Record {
        compiler: compiler(),
        arch: ARCH,
        sizes,
        ops,
    }
}

fn counted(emulator: &Loaded, cuda: &Cuda, case: &mut Case<Cuda>) -> Counted {
    // Streams run late: what was queued before is none of this op's.
    settle(cuda);
    emulator.reset_counters();
    (case.run)(cuda).unwrap();
    settle(cuda);
    let count = |what: &str, kernel: &str| emulator.counter(&format!("{what}:{kernel}"));
    let kernels: Vec<KernelTraffic> = kernel_names()
        .into_iter()
        .filter(|kernel| count("launch", kernel) > 0)
        .map(|kernel| KernelTraffic {
            launches: count("launch", &kernel),
            requested_read: count("read_bytes", &kernel),
            requested_written: count("written_bytes", &kernel),
            touched_read: 32 * count("read_sectors", &kernel),
            touched_written: 32 * count("written_sectors", &kernel),
            kernel,
        })
        .collect();
    assert!(!kernels.is_empty(), "{}: no kernel ran", case.name);
    let sum = |of: fn(&KernelTraffic) -> i64| kernels.iter().map(of).sum::<i64>() as f64;
    let minimum = (case.work.read + case.work.written) as f64;
    let rounded = |ratio: f64| (ratio * 1e4).round() / 1e4;
    Counted {
        op: case.name.clone(),
        minimum: case.work,
        requested: rounded(sum(|k| k.requested_read + k.requested_written) / minimum),
        touched: rounded(sum(|k| k.touched_read + k.touched_written) / minimum),
        note: case.note,
        kernels,
    }
}

/// Waits for all that was queued.
fn settle(cuda: &Cuda) {
    let nothing = cuda.zeros::<f32>(1).unwrap();
    cuda.read(&nothing, 1).unwrap();
}

/// Every kernel there is, by the record of their registers.
fn kernel_names() -> BTreeSet<String> {
    let record = std::fs::read_to_string(sources().join("registers.txt")).unwrap();
    let lines = record.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.split(' ').nth(1).unwrap().to_owned())
        .collect()
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda_emulator")
}

fn compiler() -> String {
    let name = std::env::var("EMULATOR_CXX").unwrap_or_else(|_| "g++".to_owned());
    let asked = Command::new(name).arg("-dumpversion").output().unwrap();
    let version = String::from_utf8(asked.stdout).unwrap();
    version.trim().split('.').next().unwrap().to_owned()
}

fn compare(record: &Record) {
    for op in &record.ops {
        let Counted {
            op,
            requested,
            touched,
            note,
            ..
        } = op;
        // Nothing is left out: the op reads and writes all of its operands.
        assert!(
            *touched >= 0.999,
            "{op}: {touched} of its minimum is touched"
        );
        assert!(*requested >= 0.999, "{op}: {requested} is asked for");
        let moved = requested.max(*touched);
        assert!(
            moved <= NEARLY_ALL || !note.is_empty(),
            "{op} asks for {requested} and touches {touched} of its minimum, and no reason is given"
        );
    }
    let text = serde_json::to_string_pretty(record).unwrap() + "\n";
    let path = sources().join("traffic.json");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let on_record = std::fs::read_to_string(&path).unwrap_or_default();
    let recorded: serde_json::Value = serde_json::from_str(&on_record).unwrap_or_default();
    if recorded["compiler"] != record.compiler.as_str() && !recorded.is_null() {
        println!(
            "not compared: the record was made with g++ {}",
            recorded["compiler"]
        );
        return;
    }
    let note = "the counts differ from the record; UPDATE_SNAPSHOTS=1 writes it anew";
    assert_eq!(on_record, text, "{note}");
}
