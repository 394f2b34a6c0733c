//! Compiled kernels on disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::gpu::{Manner, PLAIN, emulator, half, on_gpus};
use super::outcome::metrics;
use super::program::succeed;

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

#[test]
fn a_damaged_file_is_compiled_again_and_a_good_one_is_not() {
    let Some(emulator) = emulator() else { return };
    let mut setup = half("lora_train");
    setup.set_steps(1);
    let cache = setup.folder.path().join("kernels");
    let run = |output: &str, manner: Manner| {
        let output = setup.output(output);
        let mut command = on_gpus(&emulator, &setup, &output, "0", manner);
        succeed(command.env("MP_TRAIN_KERNEL_CACHE", &cache));
        metrics(&output)
    };
    let first = run("first", PLAIN);
    let compiled = files(&cache);
    assert!(compiled.len() >= 10);
    for (damage, (path, bytes)) in compiled.iter().enumerate() {
        let mut bytes = bytes.clone();
        match damage % 4 {
            0 => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            }
            1 => bytes.truncate(bytes.len() - 1),
            2 => bytes.clear(),
            // Nothing wrong.
            _ => {}
        }
        fs::write(path, bytes).unwrap();
    }
    assert_eq!(run("second", PLAIN), first);
    assert!(files(&cache) == compiled);
    // Without a compiler, and with nothing compiled in the pretend NVRTC's own cache.
    let nowhere = setup.folder.path().join("nowhere");
    let nowhere = nowhere.to_str().unwrap();
    let manner = [("EMULATOR_CXX", nowhere), ("EMULATOR_CACHE", nowhere)];
    assert_eq!(run("third", &manner), first);
}

#[test]
fn the_users_cache_folder_is_used_and_not_missed() {
    let Some(emulator) = emulator() else { return };
    let mut setup = half("lora_train");
    setup.set_steps(1);
    let home = setup.folder.path().join("home");
    let file = setup.folder.path().join("file");
    fs::write(&file, "").unwrap();
    let run = |output: &str, manner: Manner| {
        let mut command = on_gpus(&emulator, &setup, &setup.output(output), "0", manner);
        command.env_remove("MP_TRAIN_KERNEL_CACHE");
        command.env_remove("XDG_CACHE_HOME").env_remove("HOME");
        command.envs(manner.iter().copied());
        let told = succeed(&mut command).stderr;
        assert!(
            !told.contains("warning") && !told.contains("cache"),
            "{told}"
        );
    };
    run("home", &[("HOME", home.to_str().unwrap())]);
    let kept = files(&home.join(".cache/mp-train/kernels"));
    assert!(kept.len() >= 10);
    let other = home.join("other");
    run("other", &[("XDG_CACHE_HOME", other.to_str().unwrap())]);
    let names = |files: BTreeMap<PathBuf, Vec<u8>>| -> Vec<_> {
        let names = files.into_keys();
        names
            .map(|path| path.file_name().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(files(&other.join("mp-train/kernels"))), names(kept));
    // Where nothing can be written, every start compiles.
    run("file", &[("HOME", file.to_str().unwrap())]);
    run("nowhere", &[]);
    assert_eq!(fs::read(&file).unwrap(), b"");
}
