//! What kernels ask of device memory, counted on an emulated GPU, against what their op cannot do
//! without. Nothing varies, so the counts are on record: tests/cuda_emulator/traffic.json.
//! `UPDATE_SNAPSHOTS=1 cargo test --test kernel_traffic` writes them anew.

#![allow(clippy::unwrap_used)]

#[path = "kernel_traffic/blocks.rs"]
mod blocks;
mod cuda_emulator;
mod op_cases;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use cuda_emulator::{Emulator, Loaded};
use mp_train::backend::Backend;
use mp_train::backend::cuda::Cuda;
use op_cases::{Bound, Case, Sizes, Work};
use serde::{Deserialize, Serialize};

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

/// Has the child count: kernels are compiled for that in its whole process.
const COUNTS: [(&str, &str); 1] = [("EMULATOR_SANITIZE", "traffic")];

#[test]
fn kernels_move_what_is_on_record() {
    in_child("kernels_move_what_is_on_record", &COUNTS, |emulator| {
        let record = record(emulator);
        for op in &record.ops {
            check(op);
        }
        let recorded = &on_record("traffic.json")["compiler"];
        if recorded
            .as_str()
            .is_some_and(|made| made != record.compiler)
        {
            println!("not compared: the record was made with g++ {recorded}");
            return;
        }
        compare("traffic.json", &record);
    });
}

/// Runs a test again in a process of its own, with settings of the emulator that hold for a whole process.
fn in_child(name: &str, settings: &[(&str, &str)], test: impl FnOnce(&'static Loaded)) {
    if cuda_emulator::on_this_gpu() {
        return;
    }
    let Some(emulator) = Emulator::build() else {
        return;
    };
    let here =
        |&(name, value): &(&str, &str)| std::env::var(name).is_ok_and(|found| found == value);
    if settings.iter().all(here) {
        let loaded = emulator.load_here();
        loaded.set("EMULATOR_ARCH", ARCH);
        return test(loaded);
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{said}");
}

fn record(emulator: &Loaded) -> Record {
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
    let known: i64 = kernels.iter().map(|kernel| kernel.launches).sum();
    let all = emulator.counter("launches");
    assert!(all > 0, "{}: no kernel ran", case.name);
    assert_eq!(
        all, known,
        "{}: a kernel is not in registers.txt, which `UPDATE_SNAPSHOTS=1 cargo test --test kernel_code` writes",
        case.name
    );
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

/// Nothing is left out, as the op reads and writes all of its operands; and more needs a reason.
fn check(counted: &Counted) {
    let Counted {
        op,
        requested,
        touched,
        note,
        ..
    } = counted;
    assert!(*touched >= 0.999, "{op} touches {touched} of its minimum");
    assert!(
        *requested >= 0.999,
        "{op} asks for {requested} of its minimum"
    );
    assert!(
        requested.max(*touched) <= NEARLY_ALL || !note.is_empty(),
        "{op} asks for {requested} and touches {touched} of its minimum, and no reason is given"
    );
}

fn on_record(name: &str) -> serde_json::Value {
    let text = std::fs::read_to_string(sources().join(name)).unwrap_or_default();
    serde_json::from_str(&text).unwrap_or_default()
}

fn compare(name: &str, record: &impl Serialize) {
    let text = serde_json::to_string_pretty(record).unwrap() + "\n";
    let path = sources().join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let recorded = std::fs::read_to_string(&path).unwrap_or_default();
    let note = "differs from the record; UPDATE_SNAPSHOTS=1 writes it anew";
    assert!(recorded == text, "{}: {note}; now:\n{text}", path.display());
}

/// How a step of ChatGLM-6B launches its kernels: scripts/kernel_floors.sh puts it beside the machine code.
#[derive(Serialize)]
struct Launches {
    arch: &'static str,
    sizes: Sizes,
    ops: Vec<Launched>,
}

#[derive(Serialize)]
struct Launched {
    op: String,
    bound: Bound,
    /// The least that the op can do with.
    work: Work,
    /// None where cuBLASLt does it.
    kernels: Vec<Geometry>,
}

/// A line of the emulator's trace.
#[derive(Serialize, Deserialize)]
struct Geometry {
    kernel: String,
    grid: [u32; 3],
    block: [u32; 3],
    /// Bytes of dynamic shared memory.
    shared: u32,
}

/// Where the child of the test below leaves its trace, which it is told.
const TRACE: &str = "EMULATOR_TRACE";

#[test]
fn launches_are_those_on_record() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("trace").to_str().unwrap().to_owned();
    let trace = std::env::var(TRACE).unwrap_or(own);
    let settings = [("EMULATOR_SKIP_KERNELS", "1"), (TRACE, trace.as_str())];
    in_child("launches_are_those_on_record", &settings, |_| {
        compare("launches.json", &launches(Path::new(&trace)));
    });
}

#[test]
fn blocks_launch_what_is_on_record() {
    let folder = tempfile::tempdir().unwrap();
    let own = folder.path().join("trace").to_str().unwrap().to_owned();
    let trace = std::env::var(TRACE).unwrap_or(own);
    let settings = [("EMULATOR_SKIP_KERNELS", "1"), (TRACE, trace.as_str())];
    in_child("blocks_launch_what_is_on_record", &settings, |_| {
        let record = blocks::block_launches(Path::new(&trace));
        blocks::check(&record);
        compare("block_launches.json", &record);
    });
}

fn launches(trace: &Path) -> Launches {
    op_cases::BLANK.store(true, Ordering::Relaxed);
    let cuda = Cuda::new(0).unwrap();
    let sizes = Sizes::CHATGLM_6B;
    let mut ops = Vec::new();
    op_cases::visit(&cuda, &sizes, &[(1, sizes.rows)], &mut |cuda, mut case| {
        settle(cuda);
        let before = std::fs::read_to_string(trace).unwrap().len();
        // Only kernels are skipped: a product would be computed.
        if case.bound != Bound::Products {
            (case.run)(cuda).unwrap();
            settle(cuda);
        }
        let traced = std::fs::read_to_string(trace).unwrap();
        let launched = |line: &str| line.starts_with("{\"event\":\"launch\"");
        ops.push(Launched {
            op: case.name,
            bound: case.bound,
            work: case.work,
            kernels: traced[before..]
                .lines()
                .filter(|line| launched(line))
                .map(|line| serde_json::from_str(line).unwrap())
                .collect(),
        });
    });
    Launches {
        arch: ARCH,
        sizes,
        ops,
    }
}
