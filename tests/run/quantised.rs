//! Runs over a base of int8 or int4 codes: quantised while it is read, or from a folder that is
//! quantised already.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use half::f16;
use mp_train::checkpoint::{Dtype, HostTensor};
use mp_train::quant::{Bits, QuantisedMatrix};
use serde_json::{Value, json};

use super::family::{family, read_json};
use super::layout::Layout;
use super::outcome::{Outcome, result_tensors};
use super::program::{fail, mp_train, succeed};
use super::setup::{Setup, copy_model};

type Tensors = BTreeMap<String, HostTensor>;

/// What is asked for, and the width of its codes.
const BOTH: [(&str, Bits); 2] = [("int8", Bits::Eight), ("int4", Bits::Four)];

const STEPS: usize = 6;

/// Each linear layer's weight of every block, of ChatGLM-6B and of ChatGLM2.
fn linear_weights(tensors: &Tensors, blocks: usize) -> Vec<String> {
    let layers = [
        "query_key_value.weight",
        "attention.dense.weight",
        "dense_h_to_4h.weight",
        "dense_4h_to_h.weight",
    ];
    let is_one = |name: &&String| layers.iter().any(|layer| name.ends_with(layer));
    let names: Vec<String> = tensors.keys().filter(is_one).cloned().collect();
    assert_eq!(names.len(), 4 * blocks);
    names
}

fn quantised(tensor: &HostTensor, bits: Bits) -> QuantisedMatrix {
    let [rows, cols] = tensor.shape[..] else {
        panic!("{:?} is no matrix", tensor.shape);
    };
    QuantisedMatrix::quantise(&tensor.to_f16().unwrap(), rows, cols, bits).unwrap()
}

/// A folder as THUDM's `quantize()` and `save_pretrained` leave it.
pub fn quantise_folder(config: &mut Value, tensors: &mut Tensors, bits: Bits) {
    config["quantization_bit"] = json!(match bits {
        Bits::Eight => 8,
        Bits::Four => 4,
    });
    config["quantization_embeddings"] = json!(false);
    let blocks = config["num_layers"].as_u64().unwrap() as usize;
    for name in linear_weights(tensors, blocks) {
        let matrix = quantised(&tensors[&name], bits);
        let codes = matrix.codes.iter().map(|code| code.to_le_bytes()[0]);
        let shape = [matrix.rows, bits.row_bytes(matrix.cols)];
        let codes = HostTensor::new(Dtype::I8, shape, codes.collect()).unwrap();
        let scales = HostTensor::from_f16([matrix.rows], &matrix.scales).unwrap();
        tensors.insert(format!("{name}_scale"), scales);
        tensors.insert(name, codes);
    }
}

/// The model in a folder of its own, changed.
fn changed_model(
    setup: &Setup,
    name: &str,
    change: impl FnOnce(&mut Value, &mut Tensors),
) -> PathBuf {
    let folder = setup.folder.path().join(name);
    copy_model(&folder, change);
    folder
}

fn folder_of_codes(setup: &Setup, bits: Bits) -> PathBuf {
    changed_model(setup, &format!("codes-{bits:?}"), |config, tensors| {
        quantise_folder(config, tensors, bits);
    })
}

fn short(name: &str, precision: &str) -> Setup {
    let mut setup = Setup::golden(name);
    setup.set_steps(STEPS);
    setup.set("--precision", precision);
    // Nothing is skipped in f16.
    setup.set("--initial-loss-scale", "1024");
    setup
}

fn layouts() -> [Layout; 2] {
    let stages = family().most_stages().min(3);
    [
        Layout::new(1, "1f1b", "none", 1),
        Layout::new(stages, "gpipe", "block", 2),
    ]
}

#[test]
fn lora() {
    every_base_and_layout_ends_alike("lora_train");
}

#[test]
fn prefix() {
    every_base_and_layout_ends_alike("ptuning_train");
}

#[test]
fn projected_prefix() {
    every_base_and_layout_ends_alike("ptuning_projection_train");
}

/// Quantised at load, from a folder of codes, and frozen weights that are what the codes stand for.
fn every_base_and_layout_ends_alike(name: &str) {
    for precision in ["f32", "f16"] {
        let mut setup = short(name, precision);
        let full = setup.model.clone();
        let output = setup.output("full");
        succeed(&mut setup.command(layouts()[0], &output));
        let unquantised = Outcome::read(&output);
        for (word, bits) in BOTH {
            let frozen = changed_model(&setup, &format!("frozen-{word}"), |_, tensors| {
                for name in linear_weights(tensors, family().blocks()) {
                    let tensor = tensors.get_mut(&name).unwrap();
                    let weights = quantised(tensor, bits).dequantised();
                    *tensor = HostTensor::from_f16(tensor.shape.clone(), &weights).unwrap();
                }
            });
            let codes = folder_of_codes(&setup, bits);
            let mut first: Option<(Vec<Value>, Tensors)> = None;
            for (model, asked) in [
                (&frozen, None),
                (&full, Some(word)),
                (&codes, None),
                (&codes, Some(word)),
            ] {
                setup.model = model.clone();
                for layout in layouts() {
                    let what = format!("{name} in {precision}, {word} of {model:?} on {layout:?}");
                    let output = setup.output("quantised");
                    let _ = fs::remove_dir_all(&output);
                    let mut command = setup.command(layout, &output);
                    if let Some(asked) = asked {
                        command.args(["--quantization", asked]);
                    }
                    succeed(&mut command);
                    let found = (Outcome::read(&output).metrics, result_tensors(&output));
                    let (metrics, tensors) = first.get_or_insert_with(|| found.clone());
                    assert_eq!(found.0, *metrics, "{what}");
                    assert!(found.1 == *tensors, "{what}: other weights");
                    says_its_base(&output, model);
                }
            }
            let (metrics, _) = first.unwrap();
            assert!(metrics.iter().all(|row| row["skipped"] == false));
            assert_ne!(metrics, unquantised.metrics, "{word} changes nothing");
            setup.model = full.clone();
        }
    }
}

/// PEFT's folder names the model it belongs to.
fn says_its_base(output: &Path, model: &Path) {
    let path = output.join("adapter/adapter_config.json");
    if path.exists() {
        let config = read_json(&path);
        assert_eq!(config["base_model_name_or_path"], model.to_str().unwrap());
    }
}

#[test]
fn a_run_goes_on_from_its_checkpoint_on_other_stages() {
    let [one, three] = layouts();
    for (word, bits) in BOTH {
        let mut setup = short("lora_train", "f16");
        setup.set("--quantization", word);
        setup.set("--lora-dropout", "0.2");
        setup.set("--save-steps", "3");
        let alone = setup.output("alone");
        succeed(&mut setup.command(one, &alone));
        let expected = Outcome::read(&alone);

        // Codes made anew, and codes that were made before.
        for model in [setup.model.clone(), folder_of_codes(&setup, bits)] {
            setup.model = model;
            let output = setup.output("resumed");
            let _ = fs::remove_dir_all(&output);
            let mut command = setup.command(three, &output);
            command.arg("--resume").arg(alone.join("checkpoint-3"));
            succeed(&mut command);
            let found = Outcome::read(&output);
            assert_eq!(found.metrics, expected.metrics[3..], "{word}");
            assert!(result_tensors(&output) == result_tensors(&alone), "{word}");
        }

        let other = if word == "int8" { "int4" } else { "int8" };
        setup.model = family().path("model");
        setup.set("--quantization", other);
        let mut command = setup.command(one, &setup.output("other"));
        command.arg("--resume").arg(alone.join("checkpoint-3"));
        fail(&mut command, 2, &["model.quantization", word, other]);
    }
}

/// Answers to two prompts.
fn answers(folder: &Path, model: &Path, stages: usize, flags: &[&str]) -> String {
    let id = |key: &str| family().number(key);
    let prompt = |first: usize| {
        let ids = [first, first + 1, id("gmask_token_id"), id("bos_token_id")];
        format!("{}\n", json!({ "input_ids": ids }))
    };
    let prompts = folder.join("prompts.jsonl");
    fs::write(&prompts, prompt(5) + &prompt(40)).unwrap();
    let mut command: Command = mp_train(["generate", "--no-stop-at-eop", "--model"]);
    command
        .arg(model)
        .arg("--input")
        .arg(prompts)
        .args(["--max-new-tokens", "12"])
        .args(["--devices", &vec!["cpu"; stages].join(",")])
        .args(flags);
    succeed(&mut command).stdout
}

#[test]
fn answers_are_the_same_from_codes_made_at_load_and_from_a_folder_of_codes() {
    let setup = short("ptuning_train", "f32");
    let output = setup.output("run");
    succeed(
        setup
            .command(layouts()[0], &output)
            .args(["--quantization", "int4"]),
    );
    let adapter = output.join("adapter");
    let (folder, full) = (setup.folder.path(), &setup.model);
    for (word, bits) in BOTH {
        let codes = folder_of_codes(&setup, bits);
        for adapter in [None, Some(adapter.to_str().unwrap())] {
            let with = |flags: &[&'static str]| -> Vec<&str> {
                let adapter = adapter.iter().flat_map(|path| ["--adapter", path]);
                flags.iter().copied().chain(adapter).collect()
            };
            let asked = with(&["--quantization", word]);
            let expected = answers(folder, full, 1, &asked);
            assert!(expected.contains("new_tokens"), "{expected}");
            for stages in [1, layouts()[1].stages] {
                for (model, flags) in [(full, &asked), (&codes, &with(&[]))] {
                    let found = answers(folder, model, stages, flags);
                    assert_eq!(found, expected, "{word} of {model:?} on {stages} stages");
                }
            }
        }
    }
}

/// The run must be refused with `words`, before anything is written.
#[track_caller]
fn refused(setup: &Setup, flags: &[&str], words: &[&str]) {
    let output = setup.output("refused");
    let mut command = setup.command(layouts()[1], &output);
    fail(command.args(flags), 2, words);
    assert!(!output.exists());
}

#[test]
fn a_folder_of_other_codes_is_refused_and_says_what_to_do() {
    let mut setup = short("lora_train", "f32");
    for (word, bits) in BOTH {
        setup.model = folder_of_codes(&setup, bits);
        let other = if word == "int8" { "int4" } else { "int8" };
        let what = format!("holds {word} weights, of which {other} cannot be made");
        let words = [what.as_str(), "--quantization", "THUDM/chatglm-6b"];
        refused(&setup, &["--quantization", other], &words);
    }
}

#[test]
fn codes_are_not_trained_as_a_whole() {
    let mut setup = short("full_finetune_train", "f32");
    let words = ["--quantization", "int8", "adapter.kind = \"full\""];
    refused(&setup, &["--quantization", "int8"], &words);
    setup.model = folder_of_codes(&setup, Bits::Four);
    let words = ["int4 weights cannot be trained", "\"lora\"", "\"prefix\""];
    refused(&setup, &[], &words);
}

#[test]
fn codes_and_config_must_agree() {
    let mut setup = short("lora_train", "f32");
    let name = "transformer.layers.0.attention.query_key_value.weight";
    setup.model = changed_model(&setup, "unsaid", |config, tensors| {
        quantise_folder(config, tensors, Bits::Four);
        config.as_object_mut().unwrap().remove("quantization_bit");
    });
    refused(&setup, &[], &[name, "I8", "no quantization_bit"]);
    setup.model = changed_model(&setup, "not-so", |config, _| {
        config["quantization_bit"] = json!(8);
    });
    refused(&setup, &[], &["query_key_value", "quantization_bit", "I8"]);
    setup.model = changed_model(&setup, "other", |config, tensors| {
        quantise_folder(config, tensors, Bits::Four);
        config["quantization_bit"] = json!(8);
    });
    refused(&setup, &[], &["has shape", "config.json"]);
    let scale = format!("{name}_scale");
    setup.model = changed_model(&setup, "no-scale", |config, tensors| {
        quantise_folder(config, tensors, Bits::Eight);
        tensors.remove(&scale).unwrap();
    });
    refused(&setup, &[], &[&scale, "missing"]);
    setup.model = changed_model(&setup, "embedding", |config, tensors| {
        quantise_folder(config, tensors, Bits::Four);
        config["quantization_embeddings"] = json!(true);
    });
    refused(&setup, &[], &["quantization_embeddings", "--quantization"]);
}

#[test]
fn what_is_not_finite_is_named_by_tensor_and_row() {
    let mut setup = short("lora_train", "f32");
    let name = "transformer.layers.1.mlp.dense_4h_to_h.weight";
    setup.model = changed_model(&setup, "infinite", |_, tensors| {
        let tensor = tensors.get_mut(name).unwrap();
        let cols = tensor.shape[1];
        let mut values = tensor.to_f32().unwrap();
        values[3 * cols + 7] = 1e30;
        *tensor = HostTensor::from_f32(tensor.shape.clone(), &values).unwrap();
    });
    let words = [name, "row 3, column 7", "model.safetensors"];
    refused(&setup, &["--quantization", "int8"], &words);
    setup.model = changed_model(&setup, "scale", |config, tensors| {
        quantise_folder(config, tensors, Bits::Eight);
        let scales = tensors.get_mut(&format!("{name}_scale")).unwrap();
        let mut values = scales.to_f16().unwrap();
        values[5] = f16::NAN;
        *scales = HostTensor::from_f16(scales.shape.clone(), &values).unwrap();
    });
    refused(&setup, &[], &[name, "row 5"]);
}
