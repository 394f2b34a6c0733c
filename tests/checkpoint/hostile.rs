//! Model files that are wrong, cut short or made to do harm: an error that names the file, each time.

use std::fs;
use std::path::PathBuf;

use mp_train::checkpoint::{CheckpointError, ModelFolder, TensorSource, open_tensor_file};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use tempfile::{TempDir, tempdir};

use crate::torch_bytes::{self, Pickled};
use crate::{Random, assert_says, golden_path, read_model};

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

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(vec![0; data]);
    file
}

#[test]
fn safetensors_that_contradict_themselves() {
    let name = "model.safetensors";
    let entry = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let one = |entry: String| format!(r#"{{"w":{entry}}}"#);
    let two = |a: String, b: String| format!(r#"{{"v":{a},"w":{b}}}"#);

    refuses(name, b"", "0 bytes are too few");
    refuses(name, b"\x08\0\0\0\0\0\0", "7 bytes are too few");
    refuses(
        name,
        &[0xff; 64],
        "header claims 18446744073709551615 bytes",
    );
    refuses(
        name,
        &[&200_u64.to_le_bytes()[..], b"{}"].concat(),
        "claims 200 bytes",
    );
    let mut large = safetensors(&" ".repeat((32 << 20) + 8), 0);
    refuses(name, &large, "too large");
    large.truncate(1 << 20);
    refuses(name, &large, "header claims");
    refuses(name, &safetensors("{\"w\":", 0), "header is not valid");
    refuses(
        name,
        &[&2_u64.to_le_bytes()[..], b"\xff\xfe"].concat(),
        "header is not valid",
    );
    refuses(
        name,
        &safetensors(&"[".repeat(100_000), 0),
        "header is not valid",
    );
    let deep = one(format!("{}1{}", "[".repeat(5_000), "]".repeat(5_000)));
    refuses(name, &safetensors(&deep, 0), "header is not valid");

    let good = entry("F32", "[2]", 0, 8);
    refuses(
        name,
        &safetensors(&two(good.clone(), entry("F32", "[2]", 4, 12)), 12),
        "not valid",
    );
    refuses(
        name,
        &safetensors(&two(good.clone(), entry("F32", "[2]", 16, 24)), 24),
        "not valid",
    );
    refuses(
        name,
        &safetensors(&one(entry("F32", "[2]", 8, 0)), 8),
        "not valid",
    );
    refuses(
        name,
        &safetensors(&one(entry("F32", "[3]", 0, 8)), 8),
        "not valid",
    );
    refuses(
        name,
        &safetensors(&one(entry("F32", "[-1]", 0, 8)), 8),
        "not valid",
    );
    refuses(
        name,
        &safetensors(&one(entry("F32", "[9223372036854775807,4]", 0, 8)), 8),
        "not valid",
    );
    refuses(name, &safetensors(&one(entry("Q9", "[2]", 0, 8)), 8), "Q9");
    refuses(
        name,
        &safetensors(&one(good.clone()), 7),
        "describes 8 bytes of tensors, the file has 7",
    );
    refuses(
        name,
        &safetensors(&one(good), 9),
        "describes 8 bytes of tensors, the file has 9",
    );
    refuses(
        name,
        &safetensors(&one(entry("F8_E4M3", "[8]", 0, 8)), 8),
        "'w' has element type F8_E4M3",
    );
    refuses(
        name,
        &safetensors(&one(entry("U64", "[1]", 0, 8)), 8),
        "'w' has element type U64",
    );
}

#[test]
fn safetensors_whose_sizes_add_up_past_the_address_space() {
    let size = u64::MAX / 8;
    let entries: Vec<_> = (0..8)
        .map(|place| {
            let (from, to) = (place * size, (place + 1) * size);
            format!(r#""w{place}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{from},{to}]}}"#)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    refuses(
        "model.safetensors",
        &safetensors(&header, 8),
        "the file has 8",
    );
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

#[test]
fn a_file_that_shrinks_while_open_is_an_error_and_no_crash() {
    let bytes = fs::read(golden_path("model/model.safetensors")).unwrap();
    let (folder, path) = folder_with("model.safetensors", &bytes);
    let model = ModelFolder::open(folder.path()).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    let result = mp_train::checkpoint::TensorSource::read(&model, "lm_head.weight");
    assert_says(result, &path, "shortened");
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
    assert_says(read_model(folder.path()), &index, "'lm_head.bias'");
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
fn tensors_the_index_leaves_out_are_listed() {
    let entry = "    \"lm_head.weight\": \"pytorch_model-00002-of-00002.bin\",\n";
    let (folder, _) = with_index(|text| text.replace(entry, ""));
    let model = ModelFolder::open(folder.path()).unwrap();
    let shard = folder.path().join("pytorch_model-00002-of-00002.bin");
    assert_eq!(model.extra(), [(shard, "lm_head.weight".to_owned())]);
}

#[test]
fn an_oversized_index_is_not_read() {
    let folder = tempdir().unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    fs::File::create(&index).unwrap().set_len(65 << 20).unwrap();
    assert_says(
        read_model(folder.path()),
        &index,
        "more than the 67108864 accepted",
    );
}

#[test]
fn pytorch_files_made_to_do_harm() {
    let name = "pytorch_model.bin";
    refuses(name, b"", "not a PyTorch checkpoint");
    refuses(name, b"certainly not a zip archive", "cannot be used");
    refuses(name, &torch_bytes::zip_of(&[]), "cannot be used");
    refuses(
        name,
        &torch_bytes::zip_of(&[("model/version", b"3")]),
        "data.pkl",
    );
    refuses(name, &safetensors("{}", 0), "not a PyTorch checkpoint");

    // Lists in lists, past any stack.
    let mut deep = vec![0x80, 2];
    deep.extend([b']'].repeat(1_000_000));
    deep.extend([b'a'].repeat(999_999));
    deep.push(b'.');
    refuses(
        name,
        &torch_bytes::zip(&Pickled::raw(&deep)),
        "nesting exceeds",
    );
    refuses(name, &deep, "nesting exceeds");
    let mut tuples = vec![0x80, 2, b')'];
    tuples.extend([0x85].repeat(1_000_000));
    tuples.push(b'.');
    refuses(
        name,
        &torch_bytes::zip(&Pickled::raw(&tuples)),
        "nesting exceeds",
    );

    // A list of two copies of a list of two copies ...: 2^40 elements.
    let mut bomb = vec![0x80, 2, b']'];
    for _ in 0..40 {
        bomb.extend(b"q\x00]h\x00ah\x00a");
    }
    bomb.push(b'.');
    refuses(name, &torch_bytes::zip(&Pickled::raw(&bomb)), "memo bomb");

    // A pickle that would run a command, were it run.
    let folder = tempdir().unwrap();
    let trace = folder.path().join("was-here");
    let touch = format!("touch {}", trace.display());
    let mut command = b"\x80\x02}X\x01\0\0\0wcos\nsystem\nX".to_vec();
    command.extend((touch.len() as u32).to_le_bytes());
    command.extend(touch.as_bytes());
    command.extend(b"\x85Rs.");
    refuses(
        name,
        &torch_bytes::zip(&Pickled::raw(&command)),
        "holds no tensors",
    );
    assert!(!trace.exists());

    // Views that ask for far more memory than the file has bytes.
    let huge = Pickled::tensor("w", &[0.0], &[1 << 30, 2], &[0, 0]);
    refuses(
        name,
        &torch_bytes::zip(&huge),
        "'w' of shape [1073741824, 2] cannot stand in full",
    );
    let overflow = Pickled::tensor("w", &[0.0], &[1 << 30, 1 << 30, 1 << 30], &[0, 0, 0]);
    refuses(name, &torch_bytes::zip(&overflow), "cannot be used");
    let outside = Pickled::tensor("w", &[0.0; 4], &[2, 4], &[4, 1]);
    refuses(name, &torch_bytes::zip(&outside), "cannot be used");
    refuses(name, &torch_bytes::legacy(&outside), "cannot be used");
    let mut lying = Pickled::tensor("w", &[0.0; 4], &[4], &[1]);
    lying.storage.truncate(8);
    refuses(name, &torch_bytes::zip(&lying), "cannot be used");
    refuses(name, &torch_bytes::legacy(&lying), "cannot be used");
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

/// A tensor taken in pieces out of its file is the tensor that is read as a whole, or neither is to be
/// had.
fn opening_is_reading(file: &dyn TensorSource) {
    for name in file.names() {
        let (read, open) = (file.read(&name), file.open(&name));
        match (read, open) {
            (Ok(read), Ok(open)) => {
                assert_eq!((read.dtype, &read.shape[..]), (open.dtype(), open.shape()));
                if let Ok(values) = read.to_f32() {
                    let mut pieces = vec![0.0; values.len()];
                    open.read_f32(0, &mut pieces).unwrap();
                    let bits = |values: &[f32]| -> Vec<u32> {
                        values.iter().map(|value| value.to_bits()).collect()
                    };
                    assert_eq!(bits(&values), bits(&pieces), "{name}");
                }
            }
            (Err(_), Err(_)) => {}
            (read, open) => panic!("{name}: read {:?}, open {:?}", read.err(), open.err()),
        }
    }
}

/// Whatever single bytes are changed, reading ends in values or in an error that names the file.
#[test]
fn random_damage_never_panics() {
    let mut random = Random(2024);
    let folder = tempdir().unwrap();
    let files = [
        (
            "a.safetensors",
            fs::read(golden_path("adapter_lora_qkv/adapter_model.safetensors")).unwrap(),
        ),
        (
            "b.bin",
            fs::read(golden_path("ptuning_checkpoint/pytorch_model.bin")).unwrap(),
        ),
        (
            "c.bin",
            torch_bytes::legacy(&Pickled::tensor("w", &[1.0; 8], &[8], &[1])),
        ),
    ];
    for (name, original) in files {
        let path = folder.path().join(name);
        let mut failed = 0;
        for _ in 0..400 {
            let mut bytes = original.clone();
            for _ in 0..=random.below(3) {
                let reach = if random.below(2) == 0 {
                    bytes.len()
                } else {
                    bytes.len().min(1200)
                };
                let place = random.below(reach);
                bytes[place] = random.below(256) as u8;
            }
            fs::write(&path, &bytes).unwrap();
            let opened = open_tensor_file(&path);
            if let Ok(file) = &opened {
                opening_is_reading(file.as_ref());
            }
            let result = opened.and_then(|file| mp_train::checkpoint::read_all(file.as_ref()));
            if let Err(error) = result {
                failed += 1;
                assert!(
                    error.to_string().contains(path.to_str().unwrap()),
                    "{error}"
                );
                assert!(!matches!(error, CheckpointError::Write { .. }));
            }
        }
        assert!(
            failed > 20,
            "{name}: only {failed} of 400 damages were noticed"
        );
    }
}
