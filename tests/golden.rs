//! Every reference case of every family, by the engine, on every backend.
//!
//! `GOLDEN_DIR=<folder> cargo test --release --test golden` runs the family of that folder, or of each of
//! several, listed as in `PATH`; without it, the families of tests/golden. A folder's README says what each
//! case is; sizes, ids, ranks, lengths and steps are read from its files. One line per case and variant:
//! `case max_error limit ok|FAIL`, with the tensor that comes closest to its limit.
//!
//! `GOLDEN_BACKEND=cpu-f32 | cpu-f16 | cuda` runs one backend alone. `cuda` is an emulated GPU, and skipped
//! on a machine without g++; with `MP_TRAIN_TEST_GPU=1` it is the first GPU of the machine.
//! `GOLDEN_CASES=lora_qkv,rotary` runs these cases alone, in the families that have them.
#![allow(clippy::unwrap_used)]

mod cuda_emulator;
mod golden_cases;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use half::f16;
use mp_train::backend::cpu::Cpu;
use mp_train::backend::cuda::Cuda;
use mp_train::checkpoint::HostTensor;
use mp_train::checkpoint::safetensors::{SafetensorsFile, write_safetensors};
use mp_train::config::run::ProductSums;
use serde_json::{Value, json};

use cuda_emulator::{Emulator, Order, on_this_gpu};
use golden_cases::{Golden, Scope, Verdict, parity};

/// The families that come with the crate.
const OWN: [&str; 3] = ["chatglm-6b", "chatglm2-6b", "glm-4-9b"];

/// The folder of one of them.
fn own_family(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/golden").join(name)
}

fn families() -> Vec<PathBuf> {
    match std::env::var_os("GOLDEN_DIR") {
        Some(folders) => std::env::split_paths(&folders).collect(),
        None => OWN.map(own_family).to_vec(),
    }
}

/// Whether a backend is to be run.
fn wanted<B: Golden>() -> bool {
    let known = [Cpu::<f32>::NAME, Cpu::<f16>::NAME, Cuda::NAME];
    match std::env::var("GOLDEN_BACKEND") {
        Ok(name) => {
            assert!(
                known.contains(&&name[..]),
                "GOLDEN_BACKEND={name}: {known:?}"
            );
            name == B::NAME
        }
        Err(_) => true,
    }
}

/// Cases of adapters over frozen weights, first those that emulated GPUs run too.
const F16_SUMS: [&str; 13] = [
    "lora_qkv",
    "lora_train",
    "ptuning",
    "ptuning_train",
    "lora_all",
    "lora_attn",
    "lora_train_all",
    "ptuning_plain",
    "ptuning_projection",
    "ptuning_projection_train",
    "ptuning_train_plain",
    "ptuning_train_projection",
    "quant_int8",
];
const F16_SUMS_EMULATED: usize = 4;

/// The GPU of this machine, or an emulated one; whether there is either.
fn gpu() -> bool {
    if on_this_gpu() {
        return true;
    }
    let Some(emulator) = Emulator::build() else {
        return false;
    };
    let loaded = emulator.load_here();
    loaded.set("EMULATOR_ARCH", "80");
    loaded.set_order(Order::Forward);
    true
}

/// All cases on one backend.
struct Run {
    lines: Vec<String>,
    /// Of each family.
    verdicts: Vec<Verdict>,
}

impl Run {
    /// Each family is held against the errors of another run, where there is one.
    fn of<B: Golden>(cpu: Option<&Run>) -> Run {
        let cases = std::env::var("GOLDEN_CASES").ok();
        Run::of_cases::<B>(cpu, cases.as_deref(), ProductSums::F32)
    }

    /// These cases, separated by commas, instead of all, with products summed so.
    fn of_cases<B: Golden>(cpu: Option<&Run>, cases: Option<&str>, sums: ProductSums) -> Run {
        let mut lines = Vec::new();
        let mut say = |line: &str| lines.push(line.to_owned());
        let mut verdicts = Vec::new();
        for (index, folder) in families().iter().enumerate() {
            let scope = Scope {
                folder,
                cases,
                cpu_errors: cpu.map(|cpu| &cpu.verdicts[index].errors),
                product_sums: sums,
            };
            verdicts.push(golden_cases::run::<B>(scope, &mut say).unwrap());
        }
        for case in cases.iter().flat_map(|cases| cases.split(',')) {
            let known = verdicts.iter().any(|family| family.ran(case));
            assert!(known, "GOLDEN_CASES: no family has a case `{case}`");
        }
        Run { lines, verdicts }
    }

    /// The runs of one process are shared by its tests.
    fn on_cpu_f32() -> &'static Run {
        static RUN: OnceLock<Run> = OnceLock::new();
        RUN.get_or_init(|| Run::of::<Cpu<f32>>(None))
    }

    fn on_cpu_f16() -> &'static Run {
        static RUN: OnceLock<Run> = OnceLock::new();
        RUN.get_or_init(|| Run::of::<Cpu<f16>>(None))
    }

    /// Held against the errors of the CPU in f16. `None` without a GPU to emulate or to use.
    fn on_cuda() -> Option<&'static Run> {
        static RUN: OnceLock<Option<Run>> = OnceLock::new();
        let run = RUN.get_or_init(|| gpu().then(|| Run::of::<Cuda>(Some(Run::on_cpu_f16()))));
        run.as_ref()
    }

    /// The cases that train adapters, with products summed in f16. Emulated GPUs are slow: there some show
    /// it.
    fn on_cuda_with_f16_sums() -> Option<Run> {
        let asked = std::env::var("GOLDEN_CASES").ok();
        let cases: Vec<&str> = match &asked {
            Some(asked) => asked
                .split(',')
                .filter(|case| F16_SUMS.contains(case))
                .collect(),
            None if on_this_gpu() => F16_SUMS.to_vec(),
            None => F16_SUMS[..F16_SUMS_EMULATED].to_vec(),
        };
        let cases = cases.join(",");
        if cases.is_empty() || !gpu() {
            return None;
        }
        let cpu = Some(Run::on_cpu_f16());
        Some(Run::of_cases::<Cuda>(cpu, Some(&cases), ProductSums::F16))
    }

    /// Says how it went, past the capture of the test harness: the lines are the point.
    fn finish(&self) {
        writeln!(std::io::stdout().lock(), "{}", self.lines.join("\n")).unwrap();
        let failed = self.verdicts.iter().flat_map(|family| &family.failed);
        let failed: Vec<&str> = failed.map(String::as_str).collect();
        assert!(failed.is_empty(), "failed: {}", failed.join(", "));
    }
}

#[test]
fn golden_cpu_f32() {
    if wanted::<Cpu<f32>>() {
        Run::on_cpu_f32().finish();
    }
}

#[test]
fn golden_cpu_f16() {
    if wanted::<Cpu<f16>>() {
        Run::on_cpu_f16().finish();
    }
}

#[test]
fn golden_cuda() {
    if wanted::<Cuda>()
        && let Some(run) = Run::on_cuda()
    {
        run.finish();
    }
}

/// What GPUs with `product_sums = "f16"` are held to: the same caps, and so many times the error of the CPU
/// in f16 as tests/golden_cases/compare.rs says. The same bits in every layout, as always.
#[test]
fn golden_cuda_f16_sums() {
    if wanted::<Cuda>()
        && let Some(run) = Run::on_cuda_with_f16_sums()
    {
        run.finish();
        let ran = |case: &&str| run.verdicts.iter().any(|family| family.ran(case));
        assert!(F16_SUMS.iter().any(ran));
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() && !on_this_gpu() {
            write_f16_sums(&run);
        }
    }
}

/// docs/measurements/product-sums.json: what sums in f16 cost in accuracy.
fn write_f16_sums(run: &Run) {
    let mut rows = Vec::new();
    for (index, folder) in families().iter().enumerate() {
        let errors = [Run::on_cpu_f16(), run].map(|run| &run.verdicts[index].errors);
        rows.extend(parity::f16_sums(folder, errors[0], errors[1]).unwrap());
    }
    let git = ["rev-parse", "HEAD"];
    let commit = std::process::Command::new("git")
        .args(git)
        .output()
        .unwrap();
    let document = json!({
        "command": "UPDATE_SNAPSHOTS=1 cargo test --release --test golden golden_cuda_f16_sums",
        "device": "emulated GPU (sm_80), sums rounded to f16 behind every fourth term",
        "commit": String::from_utf8_lossy(&commit.stdout).trim(),
        "errors": rows,
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/measurements/product-sums.json");
    let text = serde_json::to_string_pretty(&document).unwrap();
    fs::write(path, text + "\n").unwrap();
}

/// docs/golden-parity.md lists these cases under these limits; `UPDATE_SNAPSHOTS=1` writes it anew.
#[test]
fn parity_page() {
    let all = wanted::<Cpu<f32>>() && wanted::<Cpu<f16>>() && wanted::<Cuda>();
    let changed = ["GOLDEN_DIR", "GOLDEN_CASES"];
    let changed = changed.iter().any(|name| std::env::var_os(name).is_some());
    if !all || changed || on_this_gpu() {
        return;
    }
    let Some(cuda) = Run::on_cuda() else {
        return;
    };
    let runs = [Run::on_cpu_f32(), Run::on_cpu_f16(), cuda];
    let mut sections = Vec::new();
    for (index, folder) in families().iter().enumerate() {
        let errors = runs.map(|run| &run.verdicts[index].errors);
        sections.push(parity::section(folder, errors).unwrap());
    }
    let page = parity::page(&sections);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/golden-parity.md");
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap_or_default();
    let note = "the page is not up to date; UPDATE_SNAPSHOTS=1 writes it anew";
    assert_eq!(parity::outline(&stored), parity::outline(&page), "{note}");
}

/// A folder with the rotary case alone, changed by `change`, and what the run says of it.
fn tampered(change: impl FnOnce(&Path, &mut Value)) -> (Vec<String>, String) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model", "cases"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    let copy =
        |name: &str| fs::copy(own_family(OWN[0]).join(name), folder.path().join(name)).unwrap();
    copy("model/config.json");
    copy("model/model.safetensors");
    copy("cases/rotary.safetensors");
    let manifest = fs::read_to_string(own_family(OWN[0]).join("cases/manifest.json")).unwrap();
    let mut manifest: Value = serde_json::from_str(&manifest).unwrap();
    let rotary = manifest["cases"]["rotary"].take();
    manifest["cases"] = json!({ "rotary": rotary });
    change(folder.path(), &mut manifest);
    let path = folder.path().join("cases/manifest.json");
    fs::write(path, manifest.to_string()).unwrap();
    let mut lines = String::new();
    let mut say = |line: &str| lines += &format!("{line}\n");
    let scope = Scope {
        folder: folder.path(),
        cases: None,
        cpu_errors: None,
        product_sums: ProductSums::F32,
    };
    let verdict = golden_cases::run::<Cpu<f32>>(scope, &mut say).unwrap();
    (verdict.failed, lines)
}

/// Rewrites a tensor of the rotary case, or adds one.
fn rewrite(folder: &Path, name: &str, tensor: HostTensor) {
    let path = folder.join("cases/rotary.safetensors");
    let source = SafetensorsFile::open(&path).unwrap();
    let mut tensors = mp_train::checkpoint::read_all(&source).unwrap();
    drop(source);
    tensors.insert(name.to_owned(), tensor);
    write_safetensors(&path, &tensors).unwrap();
}

#[test]
fn an_untouched_folder_passes() {
    let (failed, lines) = tampered(|_, _| {});
    assert!(failed.is_empty(), "{lines}");
}

#[test]
fn a_case_of_an_unknown_name_fails() {
    let (failed, lines) = tampered(|_, manifest| {
        let rotary = manifest["cases"]["rotary"].clone();
        manifest["cases"]["rotary_backwards"] = rotary;
    });
    assert_eq!(failed, ["rotary_backwards"], "{lines}");
}

#[test]
fn a_missing_file_and_a_file_of_no_case_fail() {
    let (failed, lines) = tampered(|folder, _| {
        let cases = folder.join("cases");
        fs::rename(
            cases.join("rotary.safetensors"),
            cases.join("stray.safetensors"),
        )
        .unwrap();
    });
    assert_eq!(failed, ["rotary", "stray.safetensors"], "{lines}");
}

#[test]
fn a_folder_that_nothing_reads_fails() {
    let (failed, lines) = tampered(|folder, _| {
        fs::create_dir_all(folder.join("adapters/lora_lost")).unwrap();
        fs::write(folder.join("adapters/lora_lost/adapter_config.json"), "{}").unwrap();
    });
    assert_eq!(failed, ["adapters/lora_lost/"], "{lines}");
}

#[test]
fn no_case_at_all_fails() {
    let (failed, lines) = tampered(|_, manifest| manifest["cases"] = json!({}));
    assert!(failed.contains(&"manifest".to_owned()), "{lines}");
}

#[test]
fn a_tensor_that_nothing_reads_fails() {
    let tensor = || HostTensor::from_f32([2], &[0.0, 1.0]).unwrap();
    for (name, role) in [
        ("tiny.f32.tan", "expected"),
        ("phases", "input"),
        ("phases", "hint"),
    ] {
        let (failed, lines) = tampered(|folder, manifest| {
            rewrite(folder, name, tensor());
            manifest["cases"]["rotary"]["tensors"][name] =
                json!({ "dtype": "F32", "shape": [2], "role": role });
        });
        assert_eq!(failed, ["rotary"], "{lines}");
        assert!(lines.contains(name), "{lines}");
    }
    let (failed, lines) = tampered(|folder, _| rewrite(folder, "phases", tensor()));
    assert_eq!(failed, ["rotary"], "{lines}");
}

#[test]
fn a_value_beyond_its_limit_fails_and_is_named() {
    for wrong in [2e-6, f32::NAN] {
        let (failed, lines) = tampered(|folder, _| {
            let path = folder.join("cases/rotary.safetensors");
            let source = SafetensorsFile::open(&path).unwrap();
            let tensors = mp_train::checkpoint::read_all(&source).unwrap();
            drop(source);
            let sines = &tensors["real.f32.sin"];
            let mut values = sines.to_f32().unwrap();
            values[5] += wrong;
            let sines = HostTensor::from_f32(sines.shape.clone(), &values).unwrap();
            rewrite(folder, "real.f32.sin", sines);
        });
        assert_eq!(failed, ["rotary"], "{lines}");
        assert!(lines.contains("FAIL (real.f32.sin)"), "{lines}");
    }
}
