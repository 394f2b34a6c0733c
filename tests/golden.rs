//! Every reference case of a family folder, by the engine.
//!
//! `GOLDEN_DIR=<folder> cargo test --release --test golden`; without it, tests/golden/chatglm-6b. The
//! folder's README says what each case is; sizes, ids, ranks, lengths and steps are read from its
//! files. One line per case and variant: `case max_error limit ok|FAIL`, with the tensor that comes
//! closest to its limit.
#![allow(clippy::unwrap_used)]

mod golden_cases;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use mp_train::backend::cpu::Cpu;
use mp_train::checkpoint::HostTensor;
use mp_train::checkpoint::safetensors::{SafetensorsFile, write_safetensors};
use serde_json::{Value, json};

/// The folder that comes with the crate.
fn own_family() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b")
}

#[test]
fn golden() {
    let family = std::env::var_os("GOLDEN_DIR").map_or_else(own_family, PathBuf::from);
    // Past the capture of the test harness: the lines are the point.
    let mut say = |line: &str| writeln!(std::io::stdout().lock(), "{line}").unwrap();
    let failed = golden_cases::run::<Cpu<f32>>(&family, &mut say).unwrap();
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}

/// A folder with the rotary case alone, changed by `change`, and what the run says of it.
fn tampered(change: impl FnOnce(&Path, &mut Value)) -> (Vec<String>, String) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["model", "cases"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    let copy = |name: &str| fs::copy(own_family().join(name), folder.path().join(name)).unwrap();
    copy("model/config.json");
    copy("model/model.safetensors");
    copy("cases/rotary.safetensors");
    let manifest = fs::read_to_string(own_family().join("cases/manifest.json")).unwrap();
    let mut manifest: Value = serde_json::from_str(&manifest).unwrap();
    let rotary = manifest["cases"]["rotary"].take();
    manifest["cases"] = json!({ "rotary": rotary });
    change(folder.path(), &mut manifest);
    let path = folder.path().join("cases/manifest.json");
    fs::write(path, manifest.to_string()).unwrap();
    let mut lines = String::new();
    let mut say = |line: &str| lines += &format!("{line}\n");
    let failed = golden_cases::run::<Cpu<f32>>(folder.path(), &mut say).unwrap();
    (failed, lines)
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
