//! The page that shows how far each backend is from the reference.

use std::fmt::Write;
use std::path::Path;

use mp_train::config::run::Precision;
use serde_json::{Value, json};

use super::Outcome;
use super::case::Family;
use super::compare::{Errors, number};
use super::limits::Kind;
use super::manifest::Form;

/// What the page lists.
const KINDS: [(Kind, &str); 6] = [
    (Kind::Logits, "logits"),
    (Kind::Loss, "loss"),
    (Kind::TokenLoss, "loss of a token"),
    (Kind::Gradient, "gradients"),
    (Kind::GradNorm, "grad norm"),
    (Kind::TrainingLoss, "training loss"),
];

/// Columns of measured numbers, which differ from machine to machine.
const MEASURED: std::ops::RangeInclusive<usize> = 3..=5;

const HEAD: &str = "\
# The golden cases on three backends

The largest error of each case against the reference, by kind of tensor, over all its variants, and what is
allowed. `cuda` is an emulated GPU (sm_80), running the kernels and the launch code that a GPU runs.

Written by

    UPDATE_SNAPSHOTS=1 cargo test --release --test golden

on one machine; others sum in another order. The test itself holds every tensor, these and those that are
not listed, to its limit (tests/golden_cases/limits.rs), and on `cuda` also to four times the error on
`cpu-f16`, or four steps of float16 where that is more. Errors of gradients are shares of the tensor's
largest entry where the limit is one, else absolute; those of the grad norm are absolute in f32 and shares
of the norm in f16. In f16 the reference's tokens are fed (`generate_greedy`), the loss is scaled by 1024,
and final weights are not compared. A limit in f32 that has a `+` is ten times the distance of the reference
to float64 where its manifest gives more than that limit. `@model_..` is a case on the model in that folder.

In f16 a run that amplifies rounding (its weights end further from float64 than weights may be off, even in
float32: `ptuning_train_projection`, `full_finetune` without clipping) takes each step from the weights and
moments that the run in f32 has come to.

On `cuda`, where an emulated step is slow, training runs leave out some of what the CPU shows: they see no
padding, and are repeated over three steps, not all, on one and on two stages, one run of each case.
";

const COLUMNS: &str = "\
| case | of | cpu-f32 | cpu-f16 | cuda | limit in f32 | limit in f16 |
| --- | --- | --- | --- | --- | --- | --- |
";

/// The page of all families.
pub fn page(sections: &[String]) -> String {
    sections
        .iter()
        .fold(HEAD.to_owned(), |page, section| page + section)
}

/// A family's part of it, from the errors on cpu-f32, cpu-f16 and cuda.
pub fn section(folder: &Path, errors: [&Errors; 3]) -> Outcome<String> {
    let family = Family::open(folder)?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let mut section = format!("\n## {name}\n\n{COLUMNS}");
    let grows = match family.form() {
        Form::Named => "",
        Form::Listed => " +",
    };
    for case in errors[0].cases(family.cases()) {
        for (kind, words) in KINDS {
            let [Some(single), Some(half), Some(cuda)] =
                errors.map(|errors| errors.largest(&case, kind))
            else {
                continue;
            };
            let [single, half, cuda] = [single, half, cuda].map(number);
            let [in_single, in_half] = [Precision::F32, Precision::F16]
                .map(|precision| kind.limit(precision, family.form()));
            writeln!(
                section,
                "| {case} | {words} | {single} | {half} | {cuda} | {in_single}{grows} | {in_half} |"
            )?;
        }
    }
    Ok(section)
}

/// The errors of a family's cases on the CPU in f16 and on a GPU that sums products in f16.
pub fn f16_sums(folder: &Path, cpu: &Errors, cuda: &Errors) -> Outcome<Vec<Value>> {
    let family = Family::open(folder)?;
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let mut rows = Vec::new();
    for case in cuda.cases(family.cases()) {
        for (kind, words) in KINDS {
            if let (Some(cpu), Some(cuda)) = (cpu.largest(&case, kind), cuda.largest(&case, kind)) {
                rows.push(json!({
                    "family": name,
                    "case": case,
                    "of": words,
                    "cpu_f16": number(cpu).parse::<f64>()?,
                    "cuda_f16_sums": number(cuda).parse::<f64>()?,
                    "limit": kind.half().to_string(),
                }));
            }
        }
    }
    Ok(rows)
}

/// A page but for its measured numbers.
pub fn outline(page: &str) -> Vec<String> {
    let without_numbers = |line: &str| {
        let cells = line.split('|').enumerate();
        let kept = cells.filter(|(index, _)| !MEASURED.contains(index));
        kept.map(|(_, cell)| cell).collect::<Vec<_>>().join("|")
    };
    page.lines().map(without_numbers).collect()
}
