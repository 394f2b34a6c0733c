//! The case's name selects the procedure; everything else is read from the folder.

mod adapter;
mod batch;
mod case;
mod compare;
mod engine;
mod forward;
mod generate;
mod gradients;
mod limits;
mod observed;
mod quantised;
mod rotary;
mod single;
mod training;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use mp_train::backend::cpu::Cpu;
use mp_train::backend::{Backend, BackendError, Element};

use case::{Case, Family};
use compare::Report;

/// Whatever goes wrong outside of a comparison; it fails the case.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A backend that the cases run on.
pub trait Golden: Backend + Sized {
    /// For the heading.
    const NAME: &'static str;

    /// The device, with `threads` compute threads where it has such.
    fn open(threads: usize) -> Result<Self, BackendError>;
}

impl<E: Element> Golden for Cpu<E> {
    const NAME: &'static str = "cpu";

    fn open(threads: usize) -> Result<Self, BackendError> {
        Cpu::new(threads)
    }
}

type Procedure = fn(&Family, &Case, &mut Report) -> Outcome<()>;

/// The procedure of a case, by its name.
fn procedure<B: Golden>(case: &str) -> Option<Procedure> {
    Some(match case {
        "forward_gmask" | "forward_mask" => forward::right_padded::<B>,
        "forward_left_pad" => forward::left_padded::<B>,
        "forward_explicit_mask" => forward::explicit_mask::<B>,
        "lora_qkv" | "lora_all" => gradients::lora::<B>,
        "ptuning" | "ptuning_projection" => gradients::prefix::<B>,
        "full_finetune" => gradients::full::<B>,
        "full_finetune_tied" => training::tied::<B>,
        "lora_train" => training::lora::<B>,
        "ptuning_train" | "ptuning_projection_train" => training::prefix::<B>,
        "full_finetune_train" => training::full::<B>,
        "quant_int8" | "quant_int4" => quantised::run::<B>,
        "generate_greedy" => generate::run::<B>,
        "rotary" => rotary::run,
        _ => return None,
    })
}

/// Runs all cases of a folder, hands each line to `say`, and returns the names of those that failed.
pub fn run<B: Golden>(folder: &Path, say: &mut dyn FnMut(&str)) -> Outcome<Vec<String>> {
    let family = Family::open(folder)?;
    say(&format!(
        "\n{}: {} cases on {} in {}",
        folder.display(),
        family.cases.len(),
        B::NAME,
        B::Element::NAME
    ));
    let mut failed = Vec::new();
    if family.cases.is_empty() {
        say("FAIL: the manifest has no case");
        failed.push("manifest".to_owned());
    }
    for name in &family.cases {
        let mut report = Report::new(name);
        if let Err(error) = run_case::<B>(&family, name, &mut report) {
            report.fail(error.to_string());
        }
        report.lines().iter().for_each(|line| say(line));
        if report.failed() {
            failed.push(name.clone());
        }
    }
    let mut report = Report::new("model_bin");
    report.same("as_model", family.model_bin_difference()?);
    report.lines().iter().for_each(|line| say(line));
    if report.failed() {
        failed.push("model_bin".to_owned());
    }
    for file in family.stray_files()? {
        say(&format!("{file} - - FAIL (no case of the manifest)"));
        failed.push(file);
    }
    Ok(failed)
}

fn run_case<B: Golden>(family: &Family, name: &str, report: &mut Report) -> Outcome<()> {
    let procedure = procedure::<B>(name).ok_or("no procedure for a case of this name")?;
    let case = family.case(name)?;
    let ran = catch_unwind(AssertUnwindSafe(|| procedure(family, &case, report)));
    ran.map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|text| text.to_string()))
            .unwrap_or_default()
    })??;
    for (tensor, role) in case.unread() {
        report.fail(format!("nothing reads the {role} `{tensor}`"));
    }
    Ok(())
}
