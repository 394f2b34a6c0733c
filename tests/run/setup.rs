//! Training runs of the golden cases, put to the program by the same path as a user's own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{HostTensor, open_tensor_file, read_all};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::family::{Case, family, read_json};
use super::layout::Layout;
use super::program::mp_train;

/// The training run of a case: model, rows and settings, in a folder that goes with it.
pub struct Setup {
    pub folder: TempDir,
    pub case: Case,
    pub model: PathBuf,
    pub rows: PathBuf,
    /// Flags for everything but model, rows and output.
    flags: Vec<String>,
}

impl Setup {
    /// Everything as the reference ran it.
    pub fn golden(name: &str) -> Self {
        let case = family().case(name);
        let folder = tempfile::tempdir().unwrap();
        let rows = folder.path().join("rows.jsonl");
        fs::write(&rows, training_rows(&case)).unwrap();
        let model = match name {
            "full_finetune_tied" => {
                let tied = folder.path().join("tied_model");
                copy_model(&tied, |config, tensors| {
                    config["tie_word_embeddings"] = json!(true);
                    tensors.remove("lm_head.weight");
                });
                tied
            }
            _ => family().path("model"),
        };
        let mut flags = adapter_flags(&case);
        flags.extend(optimizer_flags(&case));
        Setup {
            folder,
            model,
            rows,
            flags,
            case,
        }
    }

    /// An output folder that does not exist yet.
    pub fn output(&self, name: &str) -> PathBuf {
        self.folder.path().join("output").join(name)
    }

    /// Gives a flag another value, or adds it.
    pub fn set(&mut self, flag: &str, value: &str) {
        match self.flags.iter().position(|known| known == flag) {
            Some(place) => self.flags[place + 1] = value.to_owned(),
            None => self.flags.extend([flag.to_owned(), value.to_owned()]),
        }
    }

    /// Another length, with a warm-up that fits into it.
    pub fn set_steps(&mut self, steps: usize) {
        self.set("--max-steps", &steps.to_string());
        self.set("--warmup-steps", "1");
    }

    /// Leaves a flag out.
    pub fn unset(&mut self, flag: &str) {
        let place = self.flags.iter().position(|known| known == flag).unwrap();
        self.flags.drain(place..place + 2);
    }

    /// More micro-batches than stages, in random order, with a short one at the end of each epoch: so
    /// that the schedules differ and positions in the data matter.
    pub fn shuffle(&mut self) {
        self.set("--shuffle", "true");
        self.set("--micro-batch-size", "7");
        self.set("--gradient-accumulation", "5");
        self.set("--loss-normalisation", "per_token");
        self.set("--seed", "7");
    }

    /// The command of the run.
    pub fn command(&self, layout: Layout, output: &Path) -> Command {
        let mut command = self.command_without_layout(output);
        layout.add_to(&mut command);
        command
    }

    /// The command of the run on the default device.
    pub fn command_without_layout(&self, output: &Path) -> Command {
        let mut command = mp_train(&self.flags);
        command
            .arg("--model")
            .arg(&self.model)
            .arg("--train")
            .arg(&self.rows)
            .arg("--output")
            .arg(output);
        command
    }
}

/// A copy of the family's model, changed.
pub fn copy_model(
    folder: &Path,
    change: impl FnOnce(&mut Value, &mut BTreeMap<String, HostTensor>),
) {
    let source = open_tensor_file(&family().path("model/model.safetensors")).unwrap();
    let mut tensors = read_all(source.as_ref()).unwrap();
    let mut config = read_json(&family().path("model/config.json"));
    change(&mut config, &mut tensors);
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    write_safetensors(&folder.join("model.safetensors"), &tensors).unwrap();
}

/// The rows in the order in which the steps take them, without the pads behind the last eop.
fn training_rows(case: &Case) -> String {
    let [_, batch, length] = *case.shape("train.input_ids") else {
        panic!("{}: train.input_ids is not three-dimensional", case.name);
    };
    let (ids, labels) = (case.i64("train.input_ids"), case.i64("train.labels"));
    let eop = family().number("eos_token_id") as i64;
    let pad = family().number("pad_token_id") as i64;
    let mut text = String::new();
    for entry in case.i64("train.micro_index") {
        for row in 0..batch {
            let start = (entry as usize * batch + row) * length;
            let (ids, labels) = (&ids[start..start + length], &labels[start..start + length]);
            let end = ids.iter().rposition(|&id| id == eop).unwrap() + 1;
            assert!(ids[end..].iter().all(|&id| id == pad));
            assert!(labels[end..].iter().all(|&label| label == -100));
            let row = json!({ "input_ids": ids[..end], "labels": labels[..end] });
            text.push_str(&format!("{row}\n"));
        }
    }
    text
}

fn adapter_flags(case: &Case) -> Vec<String> {
    let text = |key: &str| case.hyper(key).to_string();
    let mut flags = if !case.hyper("r").is_null() {
        let targets = case.hyper("target_modules").as_array().unwrap();
        let targets: Vec<_> = targets.iter().map(|name| name.as_str().unwrap()).collect();
        owned([
            ["--kind", "lora"],
            ["--r", &text("r")],
            ["--lora-alpha", &text("lora_alpha")],
            ["--target-modules", &targets.join(",")],
        ])
    } else if !case.hyper("pre_seq_len").is_null() {
        owned([
            ["--kind", "prefix"],
            ["--pre-seq-len", &text("pre_seq_len")],
            ["--prefix-projection", &text("prefix_projection")],
            ["--prefix-dropout", &text("prefix_dropout")],
        ])
    } else {
        owned([["--kind", "full"]])
    };
    if let Some(adapter) = case.adapter() {
        let adapter = adapter.to_str().unwrap();
        flags.extend(owned([["--init-adapter", adapter]]));
    }
    flags
}

fn optimizer_flags(case: &Case) -> Vec<String> {
    let text = |key: &str| case.hyper(key).to_string();
    assert!(
        case.hyper("schedule")
            .as_str()
            .unwrap()
            .contains("cosine to 0")
    );
    let steps = text("steps");
    assert_eq!(steps, text("total_steps"));
    let batch = case.shape("train.input_ids")[1].to_string();
    owned([
        ["--learning-rate", &text("lr")],
        ["--lr-schedule", "cosine"],
        ["--warmup-steps", &text("warmup_steps")],
        ["--weight-decay", &text("weight_decay")],
        ["--beta1", &case.hyper("betas")[0].to_string()],
        ["--beta2", &case.hyper("betas")[1].to_string()],
        ["--eps", &text("eps")],
        ["--max-grad-norm", &text("max_grad_norm")],
        ["--loss-normalisation", "per_micro_batch"],
        ["--shuffle", "false"],
        ["--max-steps", &steps],
        ["--micro-batch-size", &batch],
        ["--gradient-accumulation", &text("gradient_accumulation")],
    ])
}

fn owned<const N: usize>(flags: [[&str; 2]; N]) -> Vec<String> {
    flags.into_iter().flatten().map(str::to_owned).collect()
}
