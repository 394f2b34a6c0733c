//! Adapters made elsewhere: whatever their form, they compute what PEFT computes of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mp_train::checkpoint::run_state::write_tensors;
use mp_train::checkpoint::torch_zip::write_torch;
use mp_train::checkpoint::{Dtype, HostTensor, LoraFiles};
use mp_train::export::Format;
use serde_json::{Value, json};

use super::tiny::{ALL, Generation, Tensors, Tiny, delta, export, json};

/// A PEFT folder of these tensors, its configuration changed.
fn folder(tiny: &Tiny, name: &str, tensors: &Tensors, changes: &[(&str, Value)]) -> PathBuf {
    let path = tiny.path(name);
    let files = tiny.lora(4, 8.0);
    files.write(&path).unwrap();
    write_tensors(&path.join("adapter_model.safetensors"), tensors).unwrap();
    change(&path, changes);
    path
}

fn change(folder: &Path, changes: &[(&str, Value)]) {
    let path = folder.join("adapter_config.json");
    let mut config = json(&path);
    for (field, value) in changes {
        config[*field] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

#[track_caller]
fn refused(folder: &Path, words: &str) {
    let error = LoraFiles::read(folder).unwrap_err().to_string();
    assert!(error.contains(words), "{error}: does not say '{words}'");
}

/// Keeps the first `r` rows of A and columns of B.
fn cut(tensor: &HostTensor, half: char, r: usize) -> HostTensor {
    let values = tensor.to_f32().unwrap();
    let (shape, values): (_, Vec<f32>) = match half {
        'A' => {
            let cols = tensor.shape[1];
            ([r, cols], values[..r * cols].to_vec())
        }
        _ => {
            let rows = values.chunks_exact(tensor.shape[1]);
            let values = rows.flat_map(|row| row[..r].to_vec());
            ([tensor.shape[0], r], values.collect())
        }
    };
    HostTensor::from_f32(shape, &values).unwrap()
}

#[test]
fn ranks_and_alphas_of_single_modules_and_root_scales() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F32);
    let mut tensors = tiny.lora(4, 8.0).tensors;
    // Block 1's MLP has rank 3 and its own alpha.
    let special = "transformer.layers.1.mlp.dense_4h_to_h";
    for half in ['A', 'B'] {
        let name = format!("base_model.model.{special}.lora_{half}.weight");
        tensors.insert(name.clone(), cut(&tensors[&name], half, 3));
    }
    for use_rslora in [false, true] {
        let changes = [
            ("use_rslora", json!(use_rslora)),
            ("rank_pattern", json!({ "layers.1.mlp.dense_4h_to_h": 3 })),
            (
                "alpha_pattern",
                json!({ "layers.1.mlp.dense_4h_to_h": 2.5 }),
            ),
        ];
        let path = folder(&tiny, &format!("mixed-{use_rslora}"), &tensors, &changes);
        let read = LoraFiles::read(&path).unwrap();
        assert_eq!(read.config.r, 4);
        for (module, ..) in read.pairs() {
            let (r, alpha) = match module == special {
                true => (3, 2.5),
                false => (4, 8.0),
            };
            let scale = match use_rslora {
                true => alpha / f64::sqrt(r as f64),
                false => alpha / r as f64,
            };
            // The same tensors with a plain configuration of that rank and scale.
            let mut plain = LoraFiles {
                config: read.config.clone(),
                tensors: tensors.clone(),
            };
            plain.config.r = r;
            plain.config.lora_alpha = (scale * r as f64) as f32;
            let expected = delta(&plain, module).unwrap();
            for (found, expected) in delta(&read, module).unwrap().iter().zip(expected) {
                assert!(
                    (found - expected).abs() < 1e-6,
                    "{module}: {found} {expected}"
                );
            }
        }
        // The engine takes it as it is, and what is written again is plain and the same.
        let answers = tiny.answers(&tiny.model, Some(&path));
        let mut options = tiny.options(Some(&path), &format!("peft-{use_rslora}"));
        options.format = Some(Format::Peft);
        export(&options).unwrap();
        let config = json(&options.output.join("adapter_config.json"));
        assert_eq!(config["use_rslora"], false);
        assert_eq!(config["rank_pattern"], json!({}));
        assert_eq!(tiny.answers(&tiny.model, Some(&options.output)), answers);
        let merged = tiny.options(Some(&path), &format!("merged-{use_rslora}"));
        export(&merged).unwrap();
        assert_eq!(tiny.answers(&merged.output, None), answers);
    }
}

#[test]
fn a_rank_pattern_that_the_tensors_contradict_or_versions_read_differently() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F32);
    let tensors = tiny.lora(4, 8.0).tensors;
    let path = folder(
        &tiny,
        "lora",
        &tensors,
        &[("rank_pattern", json!({ "dense_4h_to_h": 2 }))],
    );
    refused(&path, "has rank 4, the configuration says 2");
    let both = [
        ("rank_pattern", json!({ "dense_4h_to_h": 4 })),
        ("alpha_pattern", json!({ "mlp.dense_4h_to_h": 1 })),
    ];
    change(&path, &both);
    refused(&path, "versions of PEFT");
    change(&path, &[("alpha_pattern", json!({ "dense_4h_to_h": 1 }))]);
    LoraFiles::read(&path).unwrap();
}

#[test]
fn one_large_rank_does_not_blow_up_all_others() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F32);
    let mut tensors = Tensors::new();
    let mut insert = |layer: usize, r: usize, width: usize| {
        let lead = format!("base_model.model.transformer.layers.{layer}.attention.query_key_value");
        let zeros = |shape: [usize; 2]| {
            HostTensor::from_f32(shape, &vec![0.0; shape[0] * shape[1]]).unwrap()
        };
        tensors.insert(format!("{lead}.lora_A.weight"), zeros([r, width]));
        tensors.insert(format!("{lead}.lora_B.weight"), zeros([width, r]));
    };
    insert(0, 60_000, 1);
    for layer in 1..30 {
        insert(layer, 1, 5_000);
    }
    let changes = [
        ("r", json!(1)),
        (
            "rank_pattern",
            json!({ "0.attention.query_key_value": 60_000 }),
        ),
    ];
    let path = folder(&tiny, "bomb", &tensors, &changes);
    refused(&path, "times as large");
}

#[test]
fn names_with_the_adapters_own_and_torch_files() {
    let tiny = Tiny::new(Generation::ChatGlm2, Dtype::F32);
    let files = tiny.lora(4, 8.0);
    let path = tiny.path("lora");
    files.write(&path).unwrap();
    fs::remove_file(path.join("adapter_model.safetensors")).unwrap();
    let long = |name: &String| name.replace(".weight", ".default.weight");
    let renamed: Tensors = files
        .tensors
        .iter()
        .map(|(name, t)| (long(name), t.clone()))
        .collect();
    let bin = path.join("adapter_model.bin");
    write_torch(&bin, &renamed).unwrap();
    assert!(LoraFiles::read(&path).unwrap().tensors == files.tensors);
    write_torch(&bin, &files.tensors).unwrap();
    assert!(LoraFiles::read(&path).unwrap().tensors == files.tensors);
    let mut both = renamed.clone();
    both.extend(files.tensors.clone());
    write_torch(&bin, &both).unwrap();
    refused(&path, "with and without '.default'");
}

#[test]
fn modules_by_pattern_by_layer_and_all_but_some() {
    for generation in ALL {
        let tiny = Tiny::new(generation, Dtype::F32);
        let mut files = tiny.lora(4, 8.0);
        let [one, other] = generation.targets();
        // Only blocks 0 and 2.
        files.tensors.retain(|name, _| !name.contains("layers.1."));
        let list = tiny.path("list");
        let modules: Vec<String> = files
            .pairs()
            .map(|(module, ..)| module.to_owned())
            .collect();
        assert_eq!(modules.len(), 4);
        files.config.target_modules = modules.clone();
        files.write(&list).unwrap();
        let answers = tiny.answers(&tiny.model, Some(&list));
        for (name, changes) in [
            (
                "layers",
                vec![
                    ("target_modules", json!([one, other])),
                    ("layers_to_transform", json!([0, 2])),
                ],
            ),
            (
                "layers_of_a_list",
                vec![
                    ("target_modules", json!([one, other])),
                    ("layers_to_transform", json!([2, 0])),
                    ("layers_pattern", json!("layers")),
                ],
            ),
            (
                "pattern",
                vec![(
                    "target_modules",
                    json!(format!(r".*\.layers\.(0|2)\..*\.({one}|{other})")),
                )],
            ),
            (
                "pattern_of_python",
                vec![("target_modules", json!(r".*layers\.(?!1\.).*(?<!x)"))],
            ),
            (
                "excluded",
                vec![
                    ("target_modules", json!([one, other])),
                    ("exclude_modules", json!(r".*layers\.1\..*")),
                ],
            ),
        ] {
            let path = folder(&tiny, name, &files.tensors, &changes);
            let read = LoraFiles::read(&path).unwrap();
            assert_eq!(read.config.target_modules, modules, "{name}");
            assert_eq!(tiny.answers(&tiny.model, Some(&path)), answers, "{name}");
            let merged = tiny.options(Some(&path), &format!("merged-{name}"));
            assert_eq!(export(&merged).unwrap().merged, 4);
            assert_eq!(tiny.answers(&merged.output, None), answers, "{name}");
        }
        let wrong = [("layers_to_transform", json!(2))];
        refused(
            &folder(&tiny, "wrong", &files.tensors, &wrong),
            "leaves out",
        );
        let pattern = [("target_modules", json!(r".*\.layers\.0\..*"))];
        refused(
            &folder(&tiny, "narrow", &files.tensors, &pattern),
            "leaves out",
        );
    }
}

/// Rows of ids and a training run over them that starts from an adapter; returns the new adapter.
fn train_on(tiny: &Tiny, adapter: &Path, output: &str, more: &[&str]) -> (PathBuf, Output) {
    let rows = tiny.path("rows.jsonl");
    let row = |i: u32| {
        let prompt = (0..5).map(|j| 10 + (i * 7 + j * 3) % 60).chain([81, 84]);
        let answer: Vec<u32> = (0..6).map(|j| 10 + (i * 5 + j) % 60).collect();
        let ids: Vec<u32> = prompt.chain(answer.clone()).collect();
        let labels: Vec<i64> = (0..7)
            .map(|_| -100)
            .chain(answer.into_iter().map(i64::from))
            .collect();
        json!({ "input_ids": ids, "labels": labels }).to_string()
    };
    fs::write(&rows, (0..6).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    let output = tiny.path(output);
    let mut command = Command::new(env!("CARGO_BIN_EXE_mp-train"));
    command.args([
        "train",
        "--devices",
        "cpu,cpu",
        "--max-steps",
        "3",
        "--quiet",
    ]);
    command.args([
        "--learning-rate",
        "0.01",
        "--gradient-accumulation",
        "2",
        "--threads",
        "1",
    ]);
    command
        .arg("--model")
        .arg(&tiny.model)
        .arg("--train")
        .arg(&rows);
    command
        .arg("--init-adapter")
        .arg(adapter)
        .arg("--output")
        .arg(&output)
        .args(more);
    let ended = command.output().unwrap();
    (output.join("adapter"), ended)
}

#[test]
fn training_goes_on_from_an_adapter_with_ranks_of_its_own_and_keeps_them() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F32);
    let mut tensors = tiny.lora(4, 8.0).tensors;
    let special = "transformer.layers.1.mlp.dense_4h_to_h";
    let of_special = |half: char| format!("base_model.model.{special}.lora_{half}.weight");
    for half in ['A', 'B'] {
        let short = cut(&tensors[&of_special(half)], half, 3);
        tensors.insert(of_special(half), short);
    }
    let changes = [
        ("rank_pattern", json!({ "layers.1.mlp.dense_4h_to_h": 3 })),
        ("use_rslora", json!(true)),
    ];
    let path = folder(&tiny, "mixed", &tensors, &changes);
    // Rank, alpha and layers are those of the adapter.
    let (adapter, ended) = train_on(&tiny, &path, "out", &[]);
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    let (before, after) = (
        LoraFiles::read(&path).unwrap(),
        LoraFiles::read(&adapter).unwrap(),
    );
    assert_eq!(before.config.lora_alpha, after.config.lora_alpha);
    assert!(before.tensors.keys().eq(after.tensors.keys()));
    for (name, tensor) in &after.tensors {
        assert!(*tensor != before.tensors[name], "{name} was not trained");
    }
    // What was filled up with zeros stayed zero.
    let a = after.tensors[&of_special('A')].to_f32().unwrap();
    let b = after.tensors[&of_special('B')].to_f32().unwrap();
    assert!(a[3 * 72..].iter().all(|x| *x == 0.0));
    assert!(b.iter().skip(3).step_by(4).all(|x| *x == 0.0));
    assert!(a[..3 * 72].iter().all(|x| *x != 0.0));
    // What is typed must still agree.
    let (_, ended) = train_on(&tiny, &path, "other", &["--r", "8"]);
    assert_eq!(ended.status.code(), Some(2));
    let told = String::from_utf8(ended.stderr).unwrap();
    assert!(told.contains("r is 4 there and 8"), "{told}");
}

#[test]
fn training_goes_on_on_some_blocks_only() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F32);
    let mut files = tiny.lora(4, 8.0);
    files.tensors.retain(|name, _| name.contains("layers.1."));
    let changes = [("layers_to_transform", json!([1]))];
    let path = folder(&tiny, "one_block", &files.tensors, &changes);
    let (adapter, ended) = train_on(&tiny, &path, "out", &[]);
    assert!(
        ended.status.success(),
        "{}",
        String::from_utf8_lossy(&ended.stderr)
    );
    let after = LoraFiles::read(&adapter).unwrap();
    assert!(after.tensors.keys().eq(files.tensors.keys()));
    assert!(after.tensors != files.tensors);
}
