//! Model folders: which are refused, and by what words; which are taken, and as what.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use serde_json::{Value, json};

use super::family::family;
use super::layout::Layout;
use super::outcome::{metrics, result_tensors};
use super::program::{fail, succeed};
use super::setup::{Setup, copy_model};

const EMBEDDING: &str = "transformer.word_embeddings.weight";
const LM_HEAD: &str = "lm_head.weight";

type Tensors = BTreeMap<String, HostTensor>;

fn layout() -> Layout {
    Layout::new(2, "1f1b", "none", 2)
}

/// A short LoRA run on a changed copy of the family's model.
fn on_changed_model(change: impl FnOnce(&mut Value, &mut Tensors)) -> Setup {
    let mut setup = Setup::golden("lora_train");
    setup.set_steps(6);
    let model = setup.folder.path().join("model");
    copy_model(&model, change);
    setup.model = model;
    setup
}

/// The run must be refused with `words`, before anything is written.
#[track_caller]
fn refused(setup: &Setup, words: &[&str]) {
    let output = setup.output("refused");
    fail(&mut setup.command(layout(), &output), 2, words);
    assert!(!output.exists() && !output.parent().unwrap().exists());
}

fn middle_norm() -> String {
    let layer = family().blocks() / 2;
    format!("transformer.layers.{layer}.post_attention_layernorm.bias")
}

#[test]
fn a_missing_tensor_is_named() {
    let name = middle_norm();
    let setup = on_changed_model(|_, tensors| {
        tensors.remove(&name).unwrap();
    });
    refused(&setup, &[&name, "missing"]);
}

#[test]
fn a_misshapen_tensor_is_named_with_both_shapes() {
    let name = middle_norm();
    let hidden = family().number("hidden_size");
    let setup = on_changed_model(|_, tensors| {
        let wrong = HostTensor::from_f32([hidden + 1], &vec![0.0; hidden + 1]).unwrap();
        tensors.insert(name.clone(), wrong);
    });
    let shapes = [format!("[{}]", hidden + 1), format!("[{hidden}]")];
    refused(
        &setup,
        &[&name, &shapes[0], &shapes[1], "model.safetensors"],
    );
}

#[test]
fn an_extra_tensor_is_named() {
    let name = format!("transformer.layers.{}.extra", family().blocks());
    let setup = on_changed_model(|_, tensors| {
        let extra = HostTensor::from_f32([1], &[0.0]).unwrap();
        tensors.insert(name.clone(), extra);
    });
    refused(&setup, &[&name, "does not have", "model.safetensors"]);
}

#[test]
fn a_config_with_more_or_fewer_blocks_than_the_weights_is_refused() {
    let blocks = family().blocks();
    let more = on_changed_model(|config, _| config["num_layers"] = json!(blocks + 1));
    refused(
        &more,
        &[&format!("transformer.layers.{blocks}."), "missing"],
    );
    let fewer = on_changed_model(|config, _| config["num_layers"] = json!(blocks - 1));
    refused(
        &fewer,
        &[
            &format!("transformer.layers.{}.", blocks - 1),
            "does not have",
        ],
    );
}

#[test]
fn a_file_cut_short_is_refused() {
    let setup = on_changed_model(|_, _| {});
    let weights = setup.model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    for length in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        fs::write(&weights, &bytes[..length]).unwrap();
        refused(&setup, &["model.safetensors", "cannot be used"]);
    }
    fs::remove_file(&weights).unwrap();
    refused(&setup, &["no weights", "model.safetensors"]);
}

#[test]
fn a_tensor_of_integers_is_refused() {
    let name = middle_norm();
    let hidden = family().number("hidden_size");
    let setup = on_changed_model(|_, tensors| {
        let integers = HostTensor::from_i64([hidden], &vec![1; hidden]).unwrap();
        tensors.insert(name.clone(), integers);
    });
    let output = setup.output("refused");
    fail(&mut setup.command(layout(), &output), 2, &["I64"]);
    assert!(!output.exists());
}

/// Losses and final adapter of the run on the setup's model, and what was said.
fn trained(setup: &Setup, name: &str) -> (Vec<Value>, Tensors, String) {
    let output = setup.output(name);
    let ended = succeed(&mut setup.command(layout(), &output));
    (metrics(&output), result_tensors(&output), ended.stderr)
}

#[test]
fn where_a_tied_config_meets_two_matrices_lm_head_wins_with_a_warning() {
    let one_matrix = on_changed_model(|config, tensors| {
        config["tie_word_embeddings"] = json!(true);
        let head = tensors.remove(LM_HEAD).unwrap();
        tensors.insert(EMBEDDING.to_owned(), head);
    });
    let expected = trained(&one_matrix, "run");
    assert!(!expected.2.contains("warning"), "{}", expected.2);

    let tied = on_changed_model(|config, _| config["tie_word_embeddings"] = json!(true));
    let by_default = on_changed_model(|config, _| {
        config
            .as_object_mut()
            .unwrap()
            .remove("tie_word_embeddings");
    });
    for setup in [tied, by_default] {
        let found = trained(&setup, "run");
        assert_eq!((found.0, found.1), (expected.0.clone(), expected.1.clone()));
        for word in ["warning", LM_HEAD, EMBEDDING, "tie_word_embeddings"] {
            assert!(found.2.contains(word), "{word}: {}", found.2);
        }
    }
}

#[test]
fn a_head_that_is_absent_is_the_embedding() {
    let both = on_changed_model(|_, tensors| {
        let embedding = tensors[EMBEDDING].clone();
        tensors.insert(LM_HEAD.to_owned(), embedding);
    });
    let expected = trained(&both, "run");
    assert!(!expected.2.contains("warning"), "{}", expected.2);
    let untied = on_changed_model(|_, tensors| {
        tensors.remove(LM_HEAD);
    });
    let found = trained(&untied, "run");
    assert!(
        found.2.contains("warning") && found.2.contains(LM_HEAD),
        "{}",
        found.2
    );
    assert_eq!((found.0, found.1), (expected.0, expected.1));
}

#[test]
fn rotary_tables_may_be_absent_and_weights_may_come_in_shards() {
    let whole = on_changed_model(|_, _| {});
    let expected = trained(&whole, "run");
    let bare = on_changed_model(|_, tensors| {
        let before = tensors.len();
        tensors.retain(|name, _| !name.contains("inv_freq"));
        assert!(tensors.len() < before);
    });
    let found = trained(&bare, "run");
    assert_eq!((found.0, found.1), (expected.0.clone(), expected.1.clone()));

    let sharded = on_changed_model(|_, _| {});
    cut_into_shards(&sharded.model);
    let found = trained(&sharded, "run");
    assert_eq!((found.0, found.1), (expected.0, expected.1));
    fs::remove_file(shard(&sharded.model, 1)).unwrap();
    refused_again(&sharded, &["model.safetensors.index.json", "missing"]);
}

/// As [`refused`], beside the output of an earlier run.
#[track_caller]
fn refused_again(setup: &Setup, words: &[&str]) {
    let output = setup.output("refused");
    fail(&mut setup.command(layout(), &output), 2, words);
    assert!(!output.exists());
}

fn shard(model: &Path, index: usize) -> PathBuf {
    model.join(format!("model-{index:05}-of-00002.safetensors"))
}

fn cut_into_shards(model: &Path) {
    let single = model.join("model.safetensors");
    let tensors = read_all(open_tensor_file(&single).unwrap().as_ref()).unwrap();
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut weight_map = serde_json::Map::new();
    for (place, (name, tensor)) in tensors.into_iter().enumerate() {
        let file = shard(model, place % 2 + 1);
        let file = file.file_name().unwrap().to_str().unwrap();
        weight_map.insert(name.clone(), json!(file));
        shards[place % 2].insert(name, tensor);
    }
    for (place, tensors) in shards.iter().enumerate() {
        write_safetensors(&shard(model, place + 1), tensors).unwrap();
    }
    let index = json!({ "metadata": {}, "weight_map": weight_map });
    fs::write(
        model.join("model.safetensors.index.json"),
        index.to_string(),
    )
    .unwrap();
    fs::remove_file(&single).unwrap();
}
