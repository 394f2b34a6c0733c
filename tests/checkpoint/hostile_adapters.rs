//! Adapter and prefix folders that cannot be honoured are refused by the name of what is wrong.

use std::fs;
use std::path::{Path, PathBuf};

use mp_train::checkpoint::run_state::{read_json, write_json, write_tensors};
use mp_train::checkpoint::{Dtype, HostTensor, LoraFiles, PrefixFiles};
use serde_json::{Map, Value, json};
use tempfile::{TempDir, tempdir};

use crate::{assert_says, golden_path};

/// Something done to good files that makes them bad.
type Change<'a, T> = Box<dyn Fn(&mut T) + 'a>;

fn zeros(shape: [usize; 2]) -> HostTensor {
    HostTensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]]).unwrap()
}

/// A good adapter folder, its configuration and the path of that.
fn adapter() -> (TempDir, PathBuf, Map<String, Value>) {
    let folder = tempdir().unwrap();
    LoraFiles::read(&golden_path("adapter_lora_qkv"))
        .unwrap()
        .write(folder.path())
        .unwrap();
    let config = folder.path().join("adapter_config.json");
    let fields = read_json(&config).unwrap();
    (folder, config, fields)
}

/// A pattern for each of very many modules, to be compiled one by one.
fn many_patterns() -> Value {
    let entry = |i| (format!("a{i}.*b{i}.*c"), json!(1));
    Value::Object((0..5_000).map(entry).collect())
}

#[test]
fn settings_that_would_change_results_are_refused_by_name() {
    let (folder, config, fields) = adapter();
    let settings = [
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("peft_type", json!("PREFIX_TUNING")),
        ("peft_type", Value::Null),
        ("use_dora", json!(true)),
        ("use_rslora", json!("yes")),
        ("rank_pattern", json!({"query_key_value": 0})),
        ("rank_pattern", json!({"query_key_value(": 8})),
        ("rank_pattern", json!(8)),
        ("alpha_pattern", json!({"query_key_value": "4"})),
        ("modules_to_save", json!(["lm_head"])),
        ("layers_to_transform", json!([-1])),
        ("layers_to_transform", json!("0")),
        ("exclude_modules", json!([0])),
        ("target_modules", json!(vec!["query_key_value"; 20_000])),
        ("alpha_pattern", many_patterns()),
        ("layer_replication", json!([[0, 4]])),
        ("fan_in_fan_out", json!(1)),
        ("alora_invocation_tokens", json!([5])),
        ("of_a_later_version", json!(3)),
        ("enable_lora", json!([true, false, true])),
        ("init_lora_weights", json!("pissa")),
        ("r", json!(0)),
        ("r", json!(-8)),
        ("r", json!(8.5)),
        ("r", json!(1_000_000_000_u64)),
        ("lora_alpha", json!("32")),
        ("lora_alpha", json!(1e300)),
        ("lora_dropout", json!(1.0)),
        ("lora_dropout", json!(-0.1)),
        ("target_modules", json!([])),
        ("target_modules", json!([1])),
        ("target_modules", Value::Null),
        ("base_model_name_or_path", json!(7)),
    ];
    for (field, value) in settings {
        let mut changed = fields.clone();
        changed.insert(field.to_owned(), value);
        write_json(&config, &changed).unwrap();
        assert_says(
            LoraFiles::read(folder.path()),
            &config,
            &format!("{field} is "),
        );
    }
    let mut older = fields.clone();
    for gone in [
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "lora_dropout",
        "bias",
    ] {
        older.remove(gone);
    }
    write_json(&config, &older).unwrap();
    assert!(
        LoraFiles::read(folder.path()).is_ok(),
        "older versions of PEFT lack these fields"
    );
}

#[test]
fn adapter_folders_with_files_missing_or_damaged() {
    let (folder, config, _) = adapter();
    for text in ["", "{", "[]", "{\"r\": }", "\u{0}"] {
        fs::write(&config, text).unwrap();
        assert_says(
            LoraFiles::read(folder.path()),
            &config,
            "not the JSON expected",
        );
    }
    fs::remove_file(&config).unwrap();
    assert_says(LoraFiles::read(folder.path()), &config, "cannot read");
    let (folder, _, _) = adapter();
    fs::remove_file(folder.path().join("adapter_model.safetensors")).unwrap();
    assert_says(
        LoraFiles::read(folder.path()),
        folder.path(),
        "adapter_model.bin",
    );
    let torch = folder.path().join("adapter_model.bin");
    fs::write(&torch, b"PK\x03\x04 and nothing").unwrap();
    assert_says(LoraFiles::read(folder.path()), &torch, "cannot be used");
    let nowhere = Path::new("/nonexistent/adapter");
    assert_says(LoraFiles::read(nowhere), nowhere, "is not a folder");
}

#[test]
fn adapter_tensors_that_do_not_fit_their_configuration() {
    let module = "base_model.model.transformer.layers.0.attention";
    let name = |half: &str| format!("{module}.query_key_value.lora_{half}.weight");
    let changes: [(&str, Change<'_, LoraFiles>); 8] = [
        (
            "rank 4",
            Box::new(|a| drop(a.tensors.insert(name("A"), zeros([4, 64])))),
        ),
        (
            "rank 64",
            Box::new(|a| drop(a.tensors.insert(name("B"), zeros([8, 64])))),
        ),
        ("but not", Box::new(|a| drop(a.tensors.remove(&name("B"))))),
        ("no tensors", Box::new(|a| a.tensors.clear())),
        (
            "leaves out",
            Box::new(|a| a.config.target_modules = vec!["key_value".into()]),
        ),
        (
            "is not the weight",
            Box::new(|a| drop(a.tensors.insert("lm_head.weight".into(), zeros([1, 1])))),
        ),
        (
            "has shape",
            Box::new(|a| {
                let flat = HostTensor::from_f32([8], &[0.0; 8]).unwrap();
                a.tensors.insert(name("A"), flat);
            }),
        ),
        (
            "I8",
            Box::new(|a| {
                let codes = HostTensor::new(Dtype::I8, [8, 64], vec![0; 512]).unwrap();
                a.tensors.insert(name("A"), codes);
            }),
        ),
    ];
    for (part, change) in changes {
        let (folder, _, _) = adapter();
        let mut files = LoraFiles::read(folder.path()).unwrap();
        change(&mut files);
        // Not written through this program, and not read when somebody else did.
        let out = folder.path().join("never");
        assert_says(files.write(&out), &out, part);
        assert!(!out.exists());
        if part != "leaves out" {
            let path = folder.path().join("adapter_model.safetensors");
            write_tensors(&path, &files.tensors).unwrap();
            assert_says(LoraFiles::read(folder.path()), &path, part);
        }
    }
}

#[test]
fn prefix_folders_that_contradict_themselves() {
    let read = || PrefixFiles::read(&golden_path("ptuning_projection_checkpoint")).unwrap();
    let lead = "transformer.prefix_encoder";
    let changes: [(&str, Change<'_, PrefixFiles>); 5] = [
        (
            "embedding.weight",
            Box::new(|p| drop(p.tensors.remove(&format!("{lead}.embedding.weight")))),
        ),
        (
            "trans.2.bias",
            Box::new(|p| drop(p.tensors.remove(&format!("{lead}.trans.2.bias")))),
        ),
        (
            "do not fit",
            Box::new(|p| {
                drop(
                    p.tensors
                        .insert(format!("{lead}.trans.0.weight"), zeros([64, 63])),
                )
            }),
        ),
        (
            "do not fit",
            Box::new(|p| {
                drop(
                    p.tensors
                        .insert(format!("{lead}.trans.4.weight"), zeros([1, 1])),
                )
            }),
        ),
        (
            "empty",
            Box::new(|p| {
                drop(
                    p.tensors
                        .insert(format!("{lead}.embedding.weight"), zeros([0, 64])),
                )
            }),
        ),
    ];
    for (part, change) in changes {
        let mut files = read();
        change(&mut files);
        let folder = tempdir().unwrap();
        assert_says(files.write(folder.path(), Map::new()), folder.path(), part);
        write_tensors(&folder.path().join("prefix.safetensors"), &files.tensors).unwrap();
        assert_says(PrefixFiles::read(folder.path()), folder.path(), part);
    }

    let folder = tempdir().unwrap();
    read().write(folder.path(), Map::new()).unwrap();
    let config = folder.path().join("config.json");
    for (field, value) in [
        ("pre_seq_len", json!(128)),
        ("prefix_projection", json!(false)),
    ] {
        let mut fields: Map<String, Value> = read_json(&config).unwrap();
        fields.insert(field.into(), value);
        write_json(&config, &fields).unwrap();
        assert_says(
            PrefixFiles::read(folder.path()),
            &config,
            &format!("{field} is "),
        );
        read().write(folder.path(), Map::new()).unwrap();
    }
    let mut files = read();
    files.pre_seq_len = 7;
    assert_says(
        files.write(folder.path(), Map::new()),
        folder.path(),
        "pre_seq_len",
    );

    let model = golden_path("model");
    assert_says(PrefixFiles::read(&model), &model, "embedding.weight");
    let empty = tempdir().unwrap();
    assert_says(
        PrefixFiles::read(empty.path()),
        empty.path(),
        "prefix.safetensors, model.safetensors",
    );
}
