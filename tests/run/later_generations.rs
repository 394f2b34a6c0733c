//! ChatGLM2, ChatGLM3 and GLM-4 as a user trains them: every kind of adapter from every kind of folder,
//! the same bits on any layout and after an interruption, and answers with what was trained.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{open_tensor_file, read_all};
use mp_train::quant::Bits;
use serde_json::{Value, json};

use super::family::read_json;
use super::layout::Layout;
use super::outcome::Outcome;
use super::program::{fail, mp_train, succeed};
use super::quantised::quantise_folder;

/// Model folder and flags of a run.
const RUNS: [(&str, &str); 7] = [
    (
        "chatglm2-6b/model",
        "--kind lora --target-modules all-linear --lora-dropout 0.1",
    ),
    (
        "chatglm2-6b/model_bin",
        "--kind prefix --pre-seq-len 6 --prefix-projection true",
    ),
    (
        "glm-4-9b/model_chatglm_layout",
        "--kind prefix --pre-seq-len 5 --quantization int4",
    ),
    ("chatglm2-6b/model", "--kind full"),
    ("glm-4-9b/model_bf16", "--kind lora"),
    (
        "glm-4-9b/model",
        "--kind lora --quantization int8 --target-modules gate_up_proj,o_proj,k_proj",
    ),
    ("glm-4-9b/model", "--kind full"),
];

const STEPS: usize = 4;

fn tests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

fn train(model: &str, flags: &str, layout: Layout, output: &Path) -> Command {
    let mut command = mp_train(flags.split_whitespace());
    command
        .args(["--micro-batch-size", "3", "--gradient-accumulation", "4"])
        .args(["--learning-rate", "0.005", "--shuffle", "true"])
        .args(["--max-steps", &STEPS.to_string(), "--save-steps", "2"])
        .args(["--precision", "f32"])
        .arg("--model")
        .arg(tests().join("golden").join(model))
        .arg("--train")
        .arg(tests().join("data/golden_lora_train.jsonl"))
        .arg("--output")
        .arg(output);
    layout.add_to(&mut command);
    command
}

fn answers(model: &Path, adapter: Option<&Path>, quantization: &str, stages: usize) -> String {
    let folder = tempfile::tempdir().unwrap();
    let prompts = folder.path().join("prompts.jsonl");
    let rows = [vec![5, 17, 60, 91], vec![33, 120, 7, 7, 101, 64, 2]];
    let rows = rows.map(|ids| format!("{}\n", json!({ "input_ids": ids })));
    fs::write(&prompts, rows.concat()).unwrap();
    let mut command = mp_train(["generate", "--no-stop-at-eop", "--precision", "f32"]);
    command
        .args(["--max-new-tokens", "12", "--quantization", quantization])
        .args(["--devices", &vec!["cpu"; stages].join(",")])
        .arg("--model")
        .arg(model)
        .arg("--input")
        .arg(&prompts);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    succeed(&mut command).stdout
}

#[test]
fn every_adapter_is_trained_from_every_kind_of_folder() {
    let folder = tempfile::tempdir().unwrap();
    let first = Layout::new(1, "1f1b", "none", 1);
    let others = [
        Layout::new(3, "1f1b", "attention_free", 3),
        Layout::new(2, "gpipe", "block", 2),
    ];
    for (turn, (model, flags)) in RUNS.into_iter().enumerate() {
        let what = format!("{model} {flags}");
        let output = |name: &str| folder.path().join(format!("{turn}-{name}"));
        succeed(&mut train(model, flags, first, &output("first")));
        let expected = Outcome::read(&output("first"));
        let losses = expected.column("loss");
        assert_eq!(losses.len(), STEPS, "{what}");
        assert!(losses.iter().all(|loss| loss.is_finite()), "{what}");
        for (index, layout) in others.into_iter().enumerate() {
            let other = output(&index.to_string());
            succeed(&mut train(model, flags, layout, &other));
            Outcome::read(&other).assert_equals(&expected, &format!("{what} on {layout:?}"));
        }
        // From the middle, on another number of stages.
        let resumed = output("resumed");
        let mut command = train(model, flags, others[0], &resumed);
        let checkpoint = output("first").join("checkpoint-2");
        succeed(command.arg("--resume").arg(&checkpoint));
        let resumed = Outcome::read(&resumed);
        assert_eq!(resumed.metrics, expected.metrics[2..], "{what}");
        assert!(resumed.files == expected.files, "{what}: resumed");

        let base = tests().join("golden").join(model);
        let quantization = match flags.split_once("--quantization ") {
            Some((_, rest)) => rest.split_whitespace().next().unwrap(),
            None => "none",
        };
        let adapter = output("first").join("adapter");
        let answered = |stages| match flags.contains("full") {
            true => answers(&output("first").join("model"), None, "none", stages),
            false => answers(&base, Some(&adapter), quantization, stages),
        };
        let one = answered(1);
        assert_eq!(one.lines().count(), 2, "{what}");
        assert_eq!(one, answered(3), "{what}: answers on three stages");
        assert_ne!(
            one,
            answers(&base, None, quantization, 1),
            "{what}: nothing learnt"
        );
    }
}

/// As THUDM/chatglm2-6b-int4 is: codes under the names of the weights, scales beside them.
#[test]
fn a_folder_of_codes_trains_and_answers_as_codes_made_at_load() {
    let folder = tempfile::tempdir().unwrap();
    let full = tests().join("golden/chatglm2-6b/model");
    for (word, bits) in [("int8", Bits::Eight), ("int4", Bits::Four)] {
        let source = open_tensor_file(&full.join("model.safetensors")).unwrap();
        let mut tensors = read_all(source.as_ref()).unwrap();
        let mut config = read_json(&full.join("config.json"));
        quantise_folder(&mut config, &mut tensors, bits);
        let codes = folder.path().join(word);
        fs::create_dir(&codes).unwrap();
        fs::write(codes.join("config.json"), config.to_string()).unwrap();
        write_safetensors(&codes.join("model.safetensors"), &tensors).unwrap();

        let answered = answers(&full, None, word, 1);
        assert_eq!(answers(&codes, None, "none", 2), answered, "{word}");
        let run = |name: &str, model: &Path, flags: &str| {
            let output = folder.path().join(format!("{word}-{name}"));
            let layout = Layout::new(2, "1f1b", "none", 1);
            succeed(&mut train(model.to_str().unwrap(), flags, layout, &output));
            output
        };
        let made = run("made", &full, &format!("--kind lora --quantization {word}"));
        let read = run("read", &codes, "--kind lora");
        let losses = |output: &Path| Outcome::read(output).column("loss");
        assert_eq!(losses(&read), losses(&made), "{word}");
        let adapted =
            |model: &Path, word: &str| answers(model, Some(&read.join("adapter")), word, 1);
        assert_eq!(adapted(&codes, "none"), adapted(&full, word), "{word}");
        assert_ne!(adapted(&codes, "none"), answered, "{word}: nothing learnt");

        // A scale that is missing is missed by its name.
        let scale = "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight_scale";
        assert!(tensors.remove(scale).is_some(), "{scale}");
        write_safetensors(&codes.join("model.safetensors"), &tensors).unwrap();
        let output = folder.path().join("never");
        let layout = Layout::new(1, "1f1b", "none", 1);
        let mut command = train(codes.to_str().unwrap(), "--kind lora", layout, &output);
        fail(&mut command, 2, &[scale]);
    }
}

#[test]
fn lora_goes_beside_queries_keys_and_values_unless_told_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    for (model, expected) in [
        ("chatglm2-6b/model", vec!["query_key_value"]),
        ("glm-4-9b/model", vec!["k_proj", "q_proj", "v_proj"]),
    ] {
        let output = folder.path().join(model.replace('/', "-"));
        let layout = Layout::new(1, "1f1b", "none", 1);
        succeed(&mut train(model, "--kind lora", layout, &output));
        let text = fs::read_to_string(output.join("adapter/adapter_config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(config["target_modules"], json!(expected), "{model}");
    }
}

#[test]
fn a_prefix_that_nothing_could_load_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    let layout = Layout::new(1, "1f1b", "none", 1);
    let mut command = train("glm-4-9b/model", "--kind prefix", layout, &output);
    let words = ["adapter.kind = \"prefix\"", "GLM-4-9B", "\"lora\""];
    fail(&mut command, 2, &words);
    assert!(!output.exists());
}
