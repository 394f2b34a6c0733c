//! The golden training runs, through the program: close to the reference, and bit-equal among
//! themselves however the work is laid out.

use std::path::Path;

use super::family::{Case, family};
use super::layout::{Layout, covering};
use super::outcome::{Outcome, result_tensors};
use super::program::{mp_train, succeed};
use super::setup::Setup;

/// Limits of the golden README.
const LOSS: f32 = 1e-4;
const GRAD_NORM: f32 = 1e-4;
const LEARNING_RATE: f32 = 1e-8;
const FINAL_WEIGHT: f32 = 1e-4;

const CASES: [&str; 5] = [
    "lora_train",
    "ptuning_train",
    "ptuning_projection_train",
    "full_finetune_train",
    "full_finetune_tied",
];

#[test]
fn every_training_run_of_the_family_is_tested_here() {
    let mut known = CASES.map(str::to_owned).to_vec();
    known.sort_unstable();
    let mut found = family().training_cases();
    found.sort_unstable();
    assert_eq!(found, known);
}

#[test]
fn lora() {
    golden_on_every_layout(CASES[0]);
}

#[test]
fn prefix() {
    golden_on_every_layout(CASES[1]);
}

#[test]
fn projected_prefix() {
    golden_on_every_layout(CASES[2]);
}

#[test]
fn whole_model() {
    golden_on_every_layout(CASES[3]);
}

#[test]
fn whole_model_tied() {
    golden_on_every_layout(CASES[4]);
}

fn golden_on_every_layout(name: &str) {
    let setup = Setup::golden(name);
    let mut first: Option<Outcome> = None;
    for (index, layout) in covering(family().most_stages()).into_iter().enumerate() {
        let output = setup.output(&index.to_string());
        succeed(&mut setup.command(layout, &output));
        let outcome = Outcome::read(&output);
        match &first {
            None => {
                compare_with_reference(&setup.case, &outcome, &output);
                first = Some(outcome);
            }
            Some(first) => outcome.assert_equals(first, &format!("{name} on {layout:?}")),
        }
    }
}

fn compare_with_reference(case: &Case, outcome: &Outcome, output: &Path) {
    let micro: Vec<f64> = outcome
        .metrics
        .iter()
        .flat_map(|row| row["micro_losses"].as_array().unwrap())
        .map(|loss| loss.as_f64().unwrap())
        .collect();
    for (tensor, found, limit) in [
        ("train.loss", outcome.column("loss"), LOSS),
        ("train.micro_loss", micro, LOSS),
        ("train.grad_norm", outcome.column("grad_norm"), GRAD_NORM),
        ("train.lr", outcome.column("learning_rate"), LEARNING_RATE),
    ] {
        let found: Vec<f32> = found.into_iter().map(|value| value as f32).collect();
        assert_close(case, tensor, &found, limit);
    }
    let clipped = outcome.metrics.iter().filter(|row| row["clipped"] == true);
    let expected = &case.manifest["key_numbers"]["clipped_steps"];
    assert_eq!(clipped.count() as u64, expected.as_u64().unwrap());

    let tensors = result_tensors(output);
    for (name, expected) in &case.tensors {
        if let Some(own) = name.strip_prefix("final.") {
            assert_eq!(tensors[own].shape, expected.shape, "{name}");
            assert_close(case, name, &tensors[own].to_f32().unwrap(), FINAL_WEIGHT);
        }
    }
}

fn assert_close(case: &Case, tensor: &str, found: &[f32], limit: f32) {
    let expected = case.f32(tensor);
    assert_eq!(found.len(), expected.len(), "{} {tensor}", case.name);
    let errors = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let worst = errors.fold(0.0, |worst: f32, error| match error.is_nan() {
        true => f32::INFINITY,
        false => worst.max(error),
    });
    println!("{} {tensor} {worst:.2e} {limit:.0e}", case.name);
    assert!(worst <= limit, "{} {tensor}: {worst} > {limit}", case.name);
}

#[test]
fn dropout_and_order_do_not_depend_on_the_layout() {
    for (name, dropout) in [
        ("lora_train", "--lora-dropout"),
        ("ptuning_train", "--prefix-dropout"),
        ("ptuning_projection_train", "--prefix-dropout"),
    ] {
        let mut setup = Setup::golden(name);
        setup.shuffle();
        setup.set_steps(6);
        let run = |setup: &Setup, layout: Layout, output: &str| {
            let output = setup.output(output);
            succeed(&mut setup.command(layout, &output));
            Outcome::read(&output)
        };
        let layouts = covering(family().most_stages());
        let dry = run(&setup, layouts[0], "dry");
        setup.set(dropout, "0.3");
        let first = run(&setup, layouts[0], "first");
        assert_ne!(dry.metrics, first.metrics, "{name}: dropout does nothing");
        for (index, &layout) in layouts.iter().enumerate().skip(1) {
            let outcome = run(&setup, layout, &index.to_string());
            outcome.assert_equals(&first, &format!("{name} on {layout:?}"));
        }
    }
}

#[test]
fn pytorch_shards_train_to_the_same_bits() {
    let mut setup = Setup::golden("lora_train");
    let layout = Layout::new(family().most_stages().min(2), "1f1b", "none", 2);
    let [safetensors, shards] = ["safetensors", "shards"].map(|name| setup.output(name));
    succeed(&mut setup.command(layout, &safetensors));
    setup.model = family().path("model_bin");
    succeed(&mut setup.command(layout, &shards));
    let (one, other) = (Outcome::read(&safetensors), Outcome::read(&shards));
    // adapter_config.json names the model's folder, which rightly differs.
    assert_eq!(one.metrics, other.metrics);
    assert_eq!(result_tensors(&safetensors), result_tensors(&shards));
}

#[test]
fn the_example_configuration_trains_as_the_flags_do() {
    if std::env::var_os("GOLDEN_DIR").is_some() {
        return; // It names the model in this repository.
    }
    let setup = Setup::golden("lora_train");
    let [flags, file] = ["flags", "file"].map(|name| setup.output(name));
    succeed(&mut setup.command(Layout::new(3, "1f1b", "none", 2), &flags));
    let mut command = mp_train(["train", "--config", "configs/lora-golden.toml", "--output"]);
    command.arg(&file).current_dir(env!("CARGO_MANIFEST_DIR"));
    succeed(&mut command);
    let (one, other) = (Outcome::read(&flags), Outcome::read(&file));
    assert_eq!(one.metrics, other.metrics);
    assert_eq!(result_tensors(&flags), result_tensors(&file));
}
