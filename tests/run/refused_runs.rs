//! Runs that cannot start, cannot go on, or must not: exit code, words, and no half-written file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use mp_train::checkpoint::safetensors::write_safetensors;
use mp_train::checkpoint::{HostTensor, LoraFiles};

use super::family::{family, read_json};
use super::layout::Layout;
use super::outcome::{Outcome, checkpoints, metrics};
use super::program::{fail, succeed};
use super::setup::{Setup, copy_model};

fn layout() -> Layout {
    Layout::new(2, "1f1b", "none", 2)
}

/// The golden run, cut down to six steps.
fn short_lora() -> Setup {
    let mut setup = Setup::golden("lora_train");
    setup.set_steps(6);
    setup
}

/// Every file below a folder.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(contents(&path)),
            false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    files
}

#[test]
fn more_stages_than_blocks_are_refused() {
    let setup = short_lora();
    let stages = family().blocks() + 1;
    let output = setup.output("run");
    let mut command = setup.command(Layout::new(stages, "1f1b", "none", 1), &output);
    let said = format!("{stages} stages for {} blocks", family().blocks());
    fail(&mut command, 2, &[&said]);
    assert!(!output.exists());
}

#[test]
fn a_balance_for_another_model_is_refused() {
    let setup = short_lora();
    let output = setup.output("run");
    let mut command = setup.command(layout(), &output);
    let blocks = family().blocks();
    command.args(["--balance", &format!("{blocks},1")]);
    fail(&mut command, 2, &[&format!("the model has {blocks}")]);
    assert!(!output.exists());
}

#[test]
fn cpu_and_gpu_in_one_run_are_refused() {
    let setup = short_lora();
    let output = setup.output("run");
    let mut command = setup.command_without_layout(&output);
    command.args(["--devices", "cpu,0"]);
    fail(&mut command, 2, &["cpu and GPUs together", "`cpu` alone"]);
    assert!(!output.exists());
}

#[test]
fn a_row_with_an_unknown_id_is_named_by_file_and_line() {
    let setup = short_lora();
    let vocabulary = family().number("vocab_size");
    let mut rows = fs::read_to_string(&setup.rows).unwrap();
    let line = rows.lines().count() + 1;
    rows.push_str(&format!(
        "{{\"input_ids\": [{vocabulary}], \"labels\": [-100]}}\n"
    ));
    fs::write(&setup.rows, rows).unwrap();
    let output = setup.output("run");
    let words = ["rows.jsonl", &line.to_string(), &vocabulary.to_string()];
    fail(&mut setup.command(layout(), &output), 2, &words);
    assert!(!output.exists());
}

#[test]
fn there_must_be_something_to_resume() {
    let setup = short_lora();
    let output = setup.output("run");
    let resume = |from: &[&str]| {
        let mut command = setup.command(layout(), &output);
        command.arg("--resume").args(from);
        command
    };
    fail(&mut resume(&[]), 2, &["no checkpoint to resume"]);
    let nowhere = setup.folder.path().join("checkpoint-3");
    let nowhere = nowhere.to_str().unwrap();
    fail(&mut resume(&[nowhere]), 2, &[nowhere]);
    assert!(!output.exists());
}

#[test]
fn a_run_is_only_continued_as_what_it_was() {
    let mut setup = short_lora();
    setup.unset("--init-adapter");
    let output = setup.output("run");
    succeed(&mut setup.command(layout(), &output));
    let before = contents(&output);
    let golden_rows = fs::read_to_string(&setup.rows).unwrap();
    setup.set_steps(9);

    let refused = |setup: &Setup, word: &str| {
        let mut command = setup.command(layout(), &output);
        command.arg("--resume");
        fail(&mut command, 2, &[word, "checkpoint-6", "only"]);
        assert!(contents(&output) == before, "{word}");
    };
    let changes = [
        ("--r", "17", "adapter"),
        ("--lora-alpha", "1.75", "adapter"),
        ("--lora-dropout", "0.5", "adapter"),
        ("--target-modules", "dense", "adapter"),
        ("--precision", "f16", "model.precision"),
        ("--shuffle", "true", "data.shuffle"),
        ("--micro-batch-size", "9", "run.micro_batch_size"),
        ("--gradient-accumulation", "9", "run.gradient_accumulation"),
        ("--seed", "43", "run.seed"),
    ];
    for (flag, value, field) in changes {
        let mut other = short_lora();
        other.unset("--init-adapter");
        other.set(flag, value);
        refused(&other, field);
    }

    let fewer = golden_rows.lines().skip(1).map(|line| format!("{line}\n"));
    fs::write(&setup.rows, fewer.collect::<String>()).unwrap();
    refused(&setup, "data.train");
    let turned = golden_rows.lines().rev().map(|line| format!("{line}\n"));
    fs::write(&setup.rows, turned.collect::<String>()).unwrap();
    refused(&setup, "data.train");
    // The same ids and labels, at other positions.
    let mut lines = golden_rows.lines();
    let mut first: serde_json::Value = serde_json::from_str(lines.next().unwrap()).unwrap();
    let tokens = first["input_ids"].as_array().unwrap().len();
    first["position_ids"] = serde_json::json!([vec![1; tokens], vec![2; tokens]]);
    let rest = lines.map(|line| format!("{line}\n")).collect::<String>();
    fs::write(&setup.rows, format!("{first}\n{rest}")).unwrap();
    refused(&setup, "data.train");
}

#[test]
fn a_learning_rate_far_too_high_diverges_and_leaves_the_batch() {
    let mut setup = Setup::golden("lora_train");
    setup.set("--learning-rate", "1e30");
    setup.set("--lr-schedule", "constant");
    setup.set("--warmup-steps", "0");
    setup.set("--max-skipped-steps", "3");
    let mut first = None;
    for stages in 1..=family().most_stages() {
        let output = setup.output(&stages.to_string());
        let mut command = setup.command(Layout::new(stages, "1f1b", "none", 1), &output);
        fail(
            &mut command,
            3,
            &["diverged", "3 steps in a row", "diverged_batch.jsonl"],
        );
        let rows = metrics(&output);
        let skipped = rows.iter().rev().take_while(|row| row["skipped"] == true);
        assert_eq!(skipped.count(), 3);
        assert!(rows.len() > 3 && rows[0]["skipped"] == false);
        assert!(checkpoints(&output).is_empty());
        assert!(!output.join("adapter").exists());
        assert_eq!(*first.get_or_insert(rows.clone()), rows, "{stages} stages");
    }

    // The saved batch is a data set: the rows of the last step.
    let output = setup.output("1");
    let (bad, golden) = (output.join("diverged_batch.jsonl"), setup.rows.clone());
    let per_step = family().case("lora_train").shape("train.micro_index")[1]
        * family().case("lora_train").shape("train.input_ids")[1];
    let last = metrics(&output).len();
    setup.rows = bad;
    for (flag, value) in [("--learning-rate", "1e-9"), ("--max-steps", "1")] {
        setup.set(flag, value);
    }
    let replayed = setup.output("replayed");
    succeed(&mut setup.command(layout(), &replayed));
    let all = fs::read_to_string(golden).unwrap();
    let rows: Vec<_> = all
        .lines()
        .skip((last - 1) * per_step)
        .take(per_step)
        .collect();
    let same_step = setup.folder.path().join("same_step.jsonl");
    fs::write(&same_step, rows.join("\n")).unwrap();
    setup.rows = same_step;
    let expected = setup.output("expected");
    succeed(&mut setup.command(layout(), &expected));
    assert_eq!(metrics(&replayed), metrics(&expected));
}

#[test]
fn weights_that_are_no_numbers_diverge_before_any_update() {
    let mut setup = short_lora();
    let model = setup.folder.path().join("model");
    let last = family().blocks() - 1;
    copy_model(&model, |_, tensors| {
        let name = format!("transformer.layers.{last}.input_layernorm.weight");
        let norm = tensors.get_mut(&name).unwrap();
        let mut values = norm.to_f32().unwrap();
        values[1] = f32::NAN;
        *norm = HostTensor::from_f32(norm.shape.clone(), &values).unwrap();
    });
    setup.model = model;
    setup.set("--max-skipped-steps", "2");
    let output = setup.output("run");
    fail(
        &mut setup.command(layout(), &output),
        3,
        &["diverged at step 2"],
    );
    let rows = metrics(&output);
    assert!(
        rows.iter()
            .all(|row| row["skipped"] == true && row["loss"].is_null())
    );
    assert!(output.join("diverged_batch.jsonl").exists());
    assert!(checkpoints(&output).is_empty());
}

#[test]
fn a_run_that_would_learn_nothing_is_refused_with_the_tensor() {
    let mut setup = short_lora();
    let mut adapter = LoraFiles::read(&setup.case.adapter().unwrap()).unwrap();
    for (name, tensor) in &mut adapter.tensors {
        if name.contains("lora_A") {
            tensor.bytes.fill(0);
        }
    }
    let zeros = setup.folder.path().join("zeros");
    adapter.write(&zeros).unwrap();
    setup.set("--init-adapter", zeros.to_str().unwrap());
    for stages in 1..=2 {
        let output = setup.output(&stages.to_string());
        let mut command = setup.command(Layout::new(stages, "1f1b", "none", 1), &output);
        let words = ["lora_B.weight", "exactly zero", "step 1", "update", "stage"];
        fail(&mut command, 2, &words);
        assert!(checkpoints(&output).is_empty());
        assert!(!output.join("adapter").exists());
    }
}

#[test]
fn labels_that_nothing_can_influence_are_refused_with_the_prefix() {
    for name in ["ptuning_train", "ptuning_projection_train", "lora_train"] {
        let mut setup = Setup::golden(name);
        let model = setup.folder.path().join("model");
        // Without a head every logit is zero whatever the blocks do.
        copy_model(&model, |_, tensors| {
            tensors.get_mut("lm_head.weight").unwrap().bytes.fill(0);
        });
        setup.model = model;
        let output = setup.output("run");
        let tensor = match name {
            "lora_train" => "lora_B.weight",
            _ => "transformer.prefix_encoder.",
        };
        fail(
            &mut setup.command(layout(), &output),
            2,
            &[tensor, "exactly zero", "step 1"],
        );
    }
}

#[test]
fn an_output_that_cannot_be_is_told() {
    let setup = short_lora();
    let file = setup.folder.path().join("file");
    fs::write(&file, "").unwrap();
    for output in [file.join("below"), file.clone()] {
        let words = ["cannot write", file.to_str().unwrap()];
        fail(&mut setup.command(layout(), &output), 2, &words);
        assert_eq!(fs::read(&file).unwrap(), b"");
    }
}

#[test]
fn metrics_that_cannot_be_written_stop_the_run_with_a_checkpoint() {
    let setup = short_lora();
    let output = setup.output("run");
    fs::create_dir_all(output.join("metrics.jsonl")).unwrap();
    fail(
        &mut setup.command(layout(), &output),
        1,
        &["metrics.jsonl", "--resume"],
    );
    assert_eq!(checkpoints(&output), [1]);
    fs::remove_dir(output.join("metrics.jsonl")).unwrap();
    succeed(setup.command(layout(), &output).arg("--resume"));
    assert_eq!(metrics(&output).len(), 5);
}

/// Runs a command in a shell that lets no file grow beyond `blocks` of 512 bytes: a disk that is full.
fn with_little_room(command: &Command, blocks: usize) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args(["-c", r#"trap '' XFSZ; ulimit -f "$0"; exec "$@""#])
        .arg(blocks.to_string())
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

#[test]
fn a_full_disk_ends_the_run_and_leaves_the_last_checkpoint_whole() {
    let mut setup = Setup::golden("lora_train");
    setup.set_steps(24);
    setup.set("--save-steps", "10");
    let alone = setup.output("alone");
    succeed(&mut setup.command(layout(), &alone));
    let expected = Outcome::read(&alone);

    let output = setup.output("full");
    let state = alone.join(format!("checkpoint-{}", expected.metrics.len()));
    let size = fs::metadata(state.join("state.safetensors")).unwrap().len();
    let blocks = size as usize / 512 / 2;
    let command = setup.command(layout(), &output);
    let mut full = with_little_room(&command, blocks);
    fail(&mut full, 1, &["cannot write", "state.safetensors"]);
    assert!(checkpoints(&output).is_empty());
    assert!(!output.join("adapter").exists());

    // With room for one checkpoint the run comes so far; then the disk is full again.
    fs::remove_dir_all(&output).unwrap();
    fs::create_dir_all(&output).unwrap();
    let kept = alone.join("checkpoint-10");
    let copy = output.join("checkpoint-10");
    fs::create_dir_all(copy.join("adapter")).unwrap();
    for path in contents(&kept).keys() {
        fs::copy(path, copy.join(path.strip_prefix(&kept).unwrap())).unwrap();
    }
    let mut command = setup.command(layout(), &output);
    command.arg("--resume");
    fail(
        &mut with_little_room(&command, blocks),
        1,
        &["cannot write"],
    );
    assert_eq!(checkpoints(&output), [10]);
    succeed(&mut command);
    let found = Outcome::read(&output);
    assert!(found.files == expected.files);
}

#[test]
fn an_adapter_to_start_from_must_fit() {
    let mut setup = short_lora();
    setup.set("--r", "17");
    let output = setup.output("run");
    let adapter = setup.case.adapter().unwrap();
    let words = [adapter.to_str().unwrap(), "17 in this run's configuration"];
    fail(&mut setup.command(layout(), &output), 2, &words);

    let mut setup = short_lora();
    let source = setup.case.adapter().unwrap();
    let bad = setup.folder.path().join("bad");
    fs::create_dir(&bad).unwrap();
    let config = read_json(&source.join("adapter_config.json"));
    fs::write(bad.join("adapter_config.json"), config.to_string()).unwrap();
    let mut tensors = LoraFiles::read(&source).unwrap().tensors;
    let name = tensors.keys().next().unwrap().clone();
    let values = tensors[&name].to_f32().unwrap();
    let shape = tensors[&name].shape.clone();
    let not_a_number = vec![f32::NAN; values.len()];
    tensors.insert(
        name.clone(),
        HostTensor::from_f32(shape, &not_a_number).unwrap(),
    );
    write_safetensors(&bad.join("adapter_model.safetensors"), &tensors).unwrap();
    setup.set("--init-adapter", bad.to_str().unwrap());
    fail(
        &mut setup.command(layout(), &output),
        2,
        &[&name, "not finite"],
    );
    assert!(!output.exists());
}
