//! Files written by PyTorch and PEFT, read and written again.

use std::collections::BTreeMap;
use std::fs;

use mp_train::checkpoint::run_state::{read_tensors, write_tensors};
use mp_train::checkpoint::{
    Dtype, HostTensor, LoraFiles, ModelFolder, PrefixFiles, TensorSource, open_tensor_file,
};
use serde_json::{Map, Value};
use tempfile::tempdir;

use crate::torch_bytes::{self, Pickled};
use crate::{bits, golden_path};

#[test]
fn both_model_folders_hold_the_same_numbers() {
    let whole = ModelFolder::open(&golden_path("model")).unwrap();
    let sharded = ModelFolder::open(&golden_path("model_bin")).unwrap();
    assert_eq!(whole.names(), sharded.names());
    assert_eq!(whole.names().len(), 56);
    for name in whole.names() {
        let (left, right) = (whole.read(&name).unwrap(), sharded.read(&name).unwrap());
        assert_eq!(left.dtype, Dtype::F32);
        assert_eq!(right.dtype, Dtype::F16);
        assert_eq!(left.shape, right.shape, "{name}");
        assert_eq!(bits(&left), bits(&right), "{name}");
        let info = sharded.info(&name).unwrap();
        assert_eq!((info.dtype, info.shape), (right.dtype, right.shape));
        assert!(
            info.file.ends_with("pytorch_model-00001-of-00002.bin")
                || info.file.ends_with("pytorch_model-00002-of-00002.bin")
        );
    }
    assert!(whole.info("no.such").is_none());
    let missing = whole.read("no.such").unwrap_err().to_string();
    assert!(
        missing.contains("no.such") && missing.contains("chatglm-6b/model"),
        "{missing}"
    );
}

#[test]
fn threads_read_what_one_reader_reads() {
    for folder in ["model", "model_bin"] {
        let model = ModelFolder::open(&golden_path(folder)).unwrap();
        let expected: Vec<_> = model
            .names()
            .iter()
            .map(|n| model.read(n).unwrap())
            .collect();
        std::thread::scope(|scope| {
            for shift in 0..4 {
                let (model, expected) = (&model, &expected);
                scope.spawn(move || {
                    let names = model.names();
                    for place in 0..names.len() {
                        let place = (place + shift * 13) % names.len();
                        assert_eq!(model.read(&names[place]).unwrap(), expected[place]);
                    }
                });
            }
        });
    }
}

#[test]
fn peft_adapters_are_written_as_peft_wrote_them() {
    let folders = [
        ("adapter_lora_qkv", vec!["query_key_value"], 8),
        (
            "adapter_lora_all",
            vec!["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
            32,
        ),
    ];
    for (folder, targets, count) in folders {
        let path = golden_path(folder);
        let adapter = LoraFiles::read(&path).unwrap();
        assert_eq!((adapter.config.r, adapter.config.lora_alpha), (8, 32.0));
        assert_eq!(adapter.config.lora_dropout, 0.0);
        assert_eq!(
            adapter.config.base_model_name_or_path.as_deref(),
            Some("tiny-chatglm-6b")
        );
        assert_eq!(adapter.tensors.len(), count);

        let out = tempdir().unwrap();
        let out = out.path().join("new/adapter");
        adapter.write(&out).unwrap();
        let again = LoraFiles::read(&out).unwrap();
        assert_eq!(again.tensors, adapter.tensors);
        let bytes =
            |folder: &std::path::Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
        assert!(
            bytes(&path) == bytes(&out),
            "{folder}: other bytes than PEFT's"
        );

        let config = |folder: &std::path::Path| -> Map<String, Value> {
            serde_json::from_slice(&fs::read(folder.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (mut theirs, ours) = (config(&path), config(&out));
        assert!(
            ours.keys().eq(theirs.keys()),
            "the same keys in the same order"
        );
        theirs.insert("target_modules".into(), serde_json::json!(targets));
        assert_eq!(ours, theirs);
    }
}

#[test]
fn adapter_numbers_are_written_with_their_own_digits() {
    let mut adapter = LoraFiles::read(&golden_path("adapter_lora_qkv")).unwrap();
    adapter.config.lora_alpha = 12.5;
    adapter.config.lora_dropout = 0.1;
    let out = tempdir().unwrap();
    adapter.write(out.path()).unwrap();
    let text = fs::read_to_string(out.path().join("adapter_config.json")).unwrap();
    assert!(text.contains("\"lora_alpha\": 12.5,"), "{text}");
    assert!(text.contains("\"lora_dropout\": 0.1,"), "{text}");
    assert_eq!(LoraFiles::read(out.path()).unwrap(), adapter);
}

#[test]
fn target_modules_given_as_a_pattern_are_taken_from_the_tensors() {
    let out = tempdir().unwrap();
    let adapter = LoraFiles::read(&golden_path("adapter_lora_all")).unwrap();
    adapter.write(out.path()).unwrap();
    let config = out.path().join("adapter_config.json");
    let mut fields: Map<String, Value> =
        serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    fields.insert(
        "target_modules".into(),
        r".*(dense|query_key_value|h)$".into(),
    );
    fs::write(&config, serde_json::to_vec(&fields).unwrap()).unwrap();
    let targets = LoraFiles::read(out.path()).unwrap().config.target_modules;
    // Each module by its name: the pattern could leave out any of them.
    assert_eq!(targets.len(), 16);
    assert_eq!(targets[0], "transformer.layers.0.attention.dense");
    assert!(adapter.pairs().map(|(module, _, _)| module).eq(&targets));
}

#[test]
fn prefix_folders_equal_the_weights_in_the_cases() {
    let folders = [
        ("ptuning_checkpoint", "cases/ptuning.safetensors", false, 1),
        (
            "ptuning_projection_checkpoint",
            "cases/ptuning_projection.safetensors",
            true,
            5,
        ),
    ];
    for (folder, case, projection, count) in folders {
        let prefix = PrefixFiles::read(&golden_path(folder)).unwrap();
        assert_eq!(
            (prefix.pre_seq_len, prefix.prefix_projection),
            (6, projection)
        );
        assert_eq!(prefix.tensors.len(), count);
        assert!(prefix.ignored.is_empty());
        let case = read_tensors(&golden_path(case)).unwrap();
        for (name, tensor) in &prefix.tensors {
            assert_eq!(tensor, &case[&format!("weight.{name}")], "{name}");
        }
    }
}

#[test]
fn prefixes_survive_writing_and_other_spellings() {
    for folder in ["ptuning_checkpoint", "ptuning_projection_checkpoint"] {
        let path = golden_path(folder);
        let prefix = PrefixFiles::read(&path).unwrap();
        let config: Map<String, Value> =
            serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap();
        let mut base = config.clone();
        base.remove("pre_seq_len");
        base.remove("prefix_projection");
        let out = tempdir().unwrap();
        prefix.write(out.path(), base).unwrap();
        assert_eq!(PrefixFiles::read(out.path()).unwrap(), prefix);
        let written: Map<String, Value> =
            serde_json::from_slice(&fs::read(out.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(written, config);

        // As a whole-model save has it: no lead, other tensors beside, no configuration.
        let bare = tempdir().unwrap();
        let mut tensors: BTreeMap<String, HostTensor> = prefix
            .tensors
            .iter()
            .map(|(name, tensor)| (name.replacen("transformer.", "", 1), tensor.clone()))
            .collect();
        tensors.insert(
            "lm_head.weight".into(),
            HostTensor::from_f32([1], &[1.0]).unwrap(),
        );
        write_tensors(&bare.path().join("model.safetensors"), &tensors).unwrap();
        let found = PrefixFiles::read(bare.path()).unwrap();
        assert_eq!(found.tensors, prefix.tensors);
        assert_eq!(found.ignored, ["lm_head.weight"]);
    }
}

#[test]
fn every_element_type_survives_a_round_trip() {
    let types = [
        Dtype::F16,
        Dtype::Bf16,
        Dtype::F32,
        Dtype::F64,
        Dtype::I8,
        Dtype::U8,
        Dtype::I16,
        Dtype::I32,
        Dtype::I64,
        Dtype::Bool,
    ];
    let mut tensors = BTreeMap::new();
    for dtype in types {
        for (kind, shape) in [
            ("matrix", vec![3, 5]),
            ("scalar", vec![]),
            ("empty", vec![0, 4]),
        ] {
            let count = dtype.bytes_of(&shape).unwrap();
            let bytes = (0..count).map(|place| (place % 2) as u8).collect();
            let tensor = HostTensor::new(dtype, shape, bytes).unwrap();
            tensors.insert(format!("{kind}.{dtype}"), tensor);
        }
    }
    let out = tempdir().unwrap();
    let path = out.path().join("all.safetensors");
    write_tensors(&path, &tensors).unwrap();
    assert_eq!(read_tensors(&path).unwrap(), tensors);
    write_tensors(&path, &BTreeMap::new()).unwrap();
    assert!(read_tensors(&path).unwrap().is_empty());
    assert_eq!(
        fs::read_dir(out.path()).unwrap().count(),
        1,
        "no temporary file stays"
    );
}

#[test]
fn both_pytorch_containers_are_read() {
    let values = [1.0_f32, -2.0, 0.5, 65504.0];
    let pickled = Pickled::tensor("layer.weight", &values, &[2, 2], &[2, 1]);
    let strided = Pickled::tensor("layer.weight", &values, &[2, 2], &[1, 2]);
    let out = tempdir().unwrap();
    let path = out.path().join("pytorch_model.bin");
    for (bytes, expected) in [
        (torch_bytes::zip(&pickled), [1.0, -2.0, 0.5, 65504.0]),
        (torch_bytes::legacy(&pickled), [1.0, -2.0, 0.5, 65504.0]),
        (torch_bytes::zip(&strided), [1.0, 0.5, -2.0, 65504.0]),
        (torch_bytes::legacy(&strided), [1.0, 0.5, -2.0, 65504.0]),
    ] {
        fs::write(&path, bytes).unwrap();
        let file = open_tensor_file(&path).unwrap();
        assert_eq!(file.names(), ["layer.weight"]);
        let tensor = file.read("layer.weight").unwrap();
        assert_eq!(tensor.shape, [2, 2]);
        assert_eq!(tensor.to_f32().unwrap(), expected);
        let mut opened = [0.0; 4];
        let open = file.open("layer.weight").unwrap();
        open.read_f32(0, &mut opened).unwrap();
        assert_eq!(opened, expected);
    }
}
