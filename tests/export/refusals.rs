//! What cannot be exported, and that nothing is left of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::AtomicBool;

use mp_train::checkpoint::{Dtype, PrefixFiles};
use mp_train::config::run::Quantization;
use mp_train::export::{self, ExportError, ExportOptions, Format, TorchDtype};
use serde_json::Map;

use super::tiny::{Generation, Random, Tiny, export};

#[track_caller]
fn refused(options: &ExportOptions, words: &str) {
    let parent = options.output.parent().unwrap();
    let before = fs::read_dir(parent).unwrap().count();
    let error = export(options).unwrap_err().to_string();
    assert!(error.contains(words), "{error}: does not say '{words}'");
    let after = fs::read_dir(parent).unwrap().count();
    assert_eq!(before, after, "{words}: something is left behind");
}

/// A prefix that fits the model, as THUDM's ptuning leaves it.
fn prefix(tiny: &Tiny) -> std::path::PathBuf {
    let folder = tiny.path("prefix");
    let width = tiny.config.num_layers * tiny.config.key_value_width();
    let tensor = Random(3).tensor(Dtype::F32, &[5, width], 0.5);
    let name = "transformer.prefix_encoder.embedding.weight".to_owned();
    let files = PrefixFiles {
        pre_seq_len: 5,
        prefix_projection: false,
        tensors: [(name, tensor)].into(),
        ignored: Vec::new(),
    };
    files.write(&folder, Map::new()).unwrap();
    folder
}

#[test]
fn forms_that_do_not_suit_what_is_there() {
    let tiny = Tiny::new(Generation::ChatGlm2, Dtype::F16);
    let (lora, prefix) = (tiny.lora_folder(), prefix(&tiny));
    let options = |adapter: Option<&Path>, format| ExportOptions {
        format,
        ..tiny.options(adapter, "out")
    };
    refused(
        &options(Some(&prefix), Some(Format::Merged)),
        "--format thudm",
    );
    refused(&options(Some(&prefix), Some(Format::Peft)), "no PEFT form");
    refused(&options(Some(&lora), Some(Format::Thudm)), "is a LoRA");
    refused(&options(None, Some(Format::Peft)), "--adapter");
    let mut codes = options(Some(&lora), Some(Format::Peft));
    codes.quantization = Quantization::Int8;
    refused(&codes, "as it was trained");
    let mut codes = options(Some(&lora), None);
    codes.quantization = Quantization::Int8;
    codes.dtype = Some(TorchDtype::Bfloat16);
    refused(&codes, "leave --dtype out");
    let glm = Tiny::new(Generation::Glm, Dtype::Bf16);
    let mut codes = glm.options(None, "out");
    codes.quantization = Quantization::Int4;
    refused(&codes, "Leave --quantization out");
    // An adapter of another model.
    refused(&glm.options(Some(&lora), "out"), "has no linear layer");
    refused(&glm.options(Some(&prefix), "out"), "prefix");
    refused(&tiny.options(Some(&tiny.path("nowhere")), "out"), "nowhere");
}

#[test]
fn a_folder_with_something_in_it_is_left_alone() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let options = tiny.options(None, "out");
    fs::create_dir(&options.output).unwrap();
    fs::write(options.output.join("mine.txt"), "mine").unwrap();
    refused(&options, "not empty");
    assert_eq!(fs::read_dir(&options.output).unwrap().count(), 1);
    let file = tiny.options(None, "out/mine.txt");
    refused(&file, "name a new folder");
    fs::remove_file(options.output.join("mine.txt")).unwrap();
    export(&options).unwrap();
    assert!(options.output.join("model.safetensors").is_file());
    // The model's own folder is no place for its export.
    let mut onto = options.clone();
    onto.output = options.model.clone();
    refused(&onto, "not empty");
}

#[test]
fn an_export_that_is_stopped_or_fails_leaves_nothing() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let options = tiny.options(None, "out");
    let stopped = export::run(&options, &AtomicBool::new(true));
    assert!(matches!(stopped, Err(ExportError::Interrupted)));
    assert!(!options.output.exists());
    assert_eq!(fs::read_dir(tiny.folder.path()).unwrap().count(), 1);
    let weights = tiny.model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    refused(&options, "cannot be used");
}

#[test]
fn a_prefix_goes_out_as_thudm_writes_it_and_comes_back() {
    let tiny = Tiny::new(Generation::ChatGlm2, Dtype::F16);
    let prefix = prefix(&tiny);
    let options = tiny.options(Some(&prefix), "thudm");
    export(&options).unwrap();
    let config = super::tiny::json(&options.output.join("config.json"));
    assert_eq!(config["pre_seq_len"], 5);
    assert_eq!(config["prefix_projection"], false);
    assert_eq!(config["ffn_hidden_size"], 44, "the model's own settings");
    let answers = tiny.answers(&tiny.model, Some(&prefix));
    assert_ne!(answers, tiny.answers(&tiny.model, None));
    // Once by either file.
    for gone in ["prefix.safetensors", "pytorch_model.bin"] {
        let copy = tiny.path(&format!("without-{gone}"));
        fs::create_dir(&copy).unwrap();
        for entry in fs::read_dir(&options.output).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, copy.join(from.file_name().unwrap())).unwrap();
        }
        fs::remove_file(copy.join(gone)).unwrap();
        assert_eq!(
            PrefixFiles::read(&copy).unwrap(),
            PrefixFiles::read(&prefix).unwrap()
        );
        assert_eq!(tiny.answers(&tiny.model, Some(&copy)), answers);
    }
}

#[test]
fn the_command_says_what_it_wrote_and_how_it_ends() {
    let tiny = Tiny::new(Generation::ChatGlm, Dtype::F16);
    let adapter = tiny.lora_folder();
    let run = |output: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mp-train"));
        command.arg("export").arg("--model").arg(&tiny.model);
        command.arg("--adapter").arg(&adapter);
        command.arg("--output").arg(tiny.path(output)).args(more);
        let ended = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (ended.status.code(), text(ended.stdout), text(ended.stderr))
    };
    let (code, out, told) = run("out", &["--max-shard-size", "20kB"]);
    assert_eq!((code, told.as_str()), (Some(0), ""));
    assert!(
        out.contains("files, the adapter added into 6 linear layers"),
        "{out}"
    );
    let (code, out, told) = run("out", &[]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(told.contains("not empty"), "{told}");
    let (code, _, told) = run("codes", &["--quantization", "int8"]);
    assert_eq!(code, Some(0));
    assert!(told.contains("warning: the adapter was added"), "{told}");
    for size in ["0", "-1", "5 apples"] {
        let flag = format!("--max-shard-size={size}");
        assert_eq!(run("other", &[&flag]).0, Some(2), "{size}");
    }
    assert!(!tiny.path("other").exists());
}
