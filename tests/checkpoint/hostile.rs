//! Model files that are wrong, cut short or made to do harm: an error that names the file, each time.

use std::fs;
use std::path::PathBuf;

use mp_train::checkpoint::{ModelFolder, TensorSource};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::{TempDir, tempdir};

use crate::torch_bytes::{self, Pickled};
use crate::{assert_says, golden_path, read_model};

/// A folder with one file in it.
fn folder_with(name: &str, bytes: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    let path = folder.path().join(name);
    fs::write(&path, bytes).unwrap();
    (folder, path)
}

/// Reads `bytes` as the weight file `name` of a model folder, expecting an error about `part`.
#[track_caller]
fn refuses(name: &str, bytes: &[u8], part: &str) {
    let (folder, path) = folder_with(name, bytes);
    assert_says(read_model(folder.path()), &path, part);
}

#[test]
fn files_cut_short_anywhere() {
    let whole = fs::read(golden_path("ptuning_checkpoint/pytorch_model.bin")).unwrap();
    let safe = fs::read(golden_path("adapter_lora_qkv/adapter_model.safetensors")).unwrap();
    for (name, bytes) in [("pytorch_model.bin", whole), ("model.safetensors", safe)] {
        let (folder, path) = folder_with(name, &bytes);
        assert!(read_model(folder.path()).is_ok(), "whole, it is read");
        for length in (0..bytes.len()).step_by(97).chain([bytes.len() - 1]) {
            fs::write(&path, &bytes[..length]).unwrap();
            assert_says(read_model(folder.path()), &path, "");
        }
    }
}

/// Even between two pieces of one tensor.
#[test]
fn a_file_that_shrinks_while_open_is_an_error_and_no_crash() {
    for (file, name) in [
        ("model/model.safetensors", "lm_head.weight"),
        (
            "ptuning_checkpoint/pytorch_model.bin",
            "transformer.prefix_encoder.embedding.weight",
        ),
    ] {
        let bytes = fs::read(golden_path(file)).unwrap();
        let (folder, path) = folder_with(file.split('/').next_back().unwrap(), &bytes);
        let model = ModelFolder::open(folder.path()).unwrap();
        let open = model.open(name).unwrap();
        let mut piece = [0.0; 5];
        open.read_f32(3, &mut piece).unwrap();
        let shorter = fs::File::options().write(true).open(&path).unwrap();
        shorter.set_len(300).unwrap();
        assert_says(open.read_f32(7, &mut piece), &path, "shortened");
        assert_says(
            model
                .open(name)
                .and_then(|open| open.read_f32(0, &mut piece)),
            &path,
            "shortened",
        );
        assert_says(model.read(name), &path, "cannot be used");
    }
}

#[test]
fn things_that_are_not_weight_files() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    for name in [
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ] {
        refuses(name, pointer, "git lfs pull");
    }

    let empty = tempdir().unwrap();
    let missing = empty.path().join("none");
    assert_says(read_model(&missing), &missing, "is not a folder");
    assert_says(
        read_model(empty.path()),
        empty.path(),
        "model.safetensors.index.json, pytorch_model.bin",
    );

    let path = empty.path().join("model.safetensors");
    fs::create_dir(&path).unwrap();
    assert_says(read_model(empty.path()), &path, "not a plain file");
    fs::remove_dir(&path).unwrap();
    mknodat(CWD, &path, FileType::Fifo, Mode::RWXU, 0).unwrap();
    assert_says(read_model(empty.path()), &path, "not a plain file");
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("../blobs/gone", &path).unwrap();
    assert_says(read_model(empty.path()), &path, "cannot read");
}

/// The golden two-part checkpoint with its index changed by `change`.
fn with_index(change: impl Fn(&str) -> String) -> (TempDir, PathBuf) {
    let folder = tempdir().unwrap();
    for entry in fs::read_dir(golden_path("model_bin")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), folder.path().join(entry.file_name())).unwrap();
    }
    let index = folder.path().join("pytorch_model.bin.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let changed = change(&text);
    assert_ne!(text, changed);
    fs::write(&index, changed).unwrap();
    (folder, index)
}

#[test]
fn indexes_that_do_not_fit_their_shards() {
    let second = "pytorch_model-00002-of-00002.bin";
    for stranger in [
        "../x.bin",
        "/etc/passwd",
        "a/b.bin",
        "..",
        ".",
        "",
        "./x.bin",
        r"a\\b.bin",
        "x/",
    ] {
        let (folder, index) = with_index(|text| text.replace(second, stranger));
        assert_says(
            read_model(folder.path()),
            &index,
            "not a file name inside the folder",
        );
    }
    let (folder, index) = with_index(|text| text.replace(second, "pytorch_model-00003.bin"));
    assert_says(
        read_model(folder.path()),
        &index,
        "'pytorch_model-00003.bin', which is missing",
    );
    let (folder, index) = with_index(|text| text.replace("\"lm_head.weight\"", "\"lm_head.bias\""));
    assert_says(
        read_model(folder.path()),
        &index,
        "does not name tensor 'lm_head.weight'",
    );
    let swapped = |text: &str| text.replacen(second, "pytorch_model-00001-of-00002.bin", 1);
    let (folder, index) = with_index(swapped);
    assert_says(read_model(folder.path()), &index, "'lm_head.weight'");
    for (text, part) in [
        ("{\"weight_map\": {}}", "empty"),
        ("{\"weight_map\": []}", "invalid type"),
        ("{\"weight_map\": {\"a\": 1}}", "invalid type"),
        ("{}", "weight_map"),
        ("{\"weight_map\": {", "line 1 column"),
        ("", "line 1 column"),
    ] {
        let (folder, index) = with_index(|_| text.to_owned());
        assert_says(read_model(folder.path()), &index, part);
    }
}

#[test]
fn tensors_that_the_index_leaves_out_are_refused() {
    let entry = "    \"lm_head.weight\": \"pytorch_model-00002-of-00002.bin\",\n";
    let (folder, index) = with_index(|text| text.replace(entry, ""));
    assert_says(
        read_model(folder.path()),
        &index,
        "it does not name tensor 'lm_head.weight' of 'pytorch_model-00002-of-00002.bin'",
    );
}

/// What huggingface_hub makes of a download: snapshots of links to blobs.
#[test]
fn links_of_the_hugging_face_cache_are_followed() {
    let cache = tempdir().unwrap();
    let model = cache.path().join("models--THUDM--chatglm-6b");
    let (blobs, snapshot) = (model.join("blobs"), model.join("snapshots/8b7d33"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    fs::copy(golden_path("model/model.safetensors"), blobs.join("4d7a21")).unwrap();
    let link = |target: &str, folder: &std::path::Path| {
        std::os::unix::fs::symlink(target, folder.join("model.safetensors")).unwrap();
    };
    link("../../blobs/4d7a21", &snapshot);
    assert!(read_model(&snapshot).unwrap() > 0);

    // Through a folder that is itself a link, and within one folder.
    let by_name = cache.path().join("by-name");
    std::os::unix::fs::symlink(&snapshot, &by_name).unwrap();
    assert!(read_model(&by_name).unwrap() > 0);
    let inside = tempdir().unwrap();
    fs::copy(blobs.join("4d7a21"), inside.path().join("kept")).unwrap();
    link("kept", inside.path());
    assert!(read_model(inside.path()).unwrap() > 0);

    // Such a folder of somebody else is none.
    let stranger = tempdir().unwrap();
    let elsewhere = cache.path().join("blobs");
    fs::create_dir(&elsewhere).unwrap();
    fs::copy(blobs.join("4d7a21"), elsewhere.join("4d7a21")).unwrap();
    link(elsewhere.join("4d7a21").to_str().unwrap(), stranger.path());
    let path = stranger.path().join("model.safetensors");
    assert_says(read_model(stranger.path()), &path, "outside of its folder");
}

#[test]
fn a_changed_byte_in_a_pytorch_tensor_is_noticed() {
    let good = torch_bytes::zip(&Pickled::tensor("w", &[3.25; 64], &[64], &[1]));
    let pattern = 3.25_f32.to_le_bytes().repeat(64);
    let place = good
        .windows(pattern.len())
        .position(|part| part == pattern)
        .unwrap();
    let mut changed = good;
    changed[place + 17] ^= 4;
    refuses("pytorch_model.bin", &changed, "'w'");
}
