//! The case's name selects the procedure; everything else is read from the folder.

mod adapter;
mod batch;
mod case;
mod compare;
mod engine;
mod forward;
mod generate;
mod gradients;
pub mod limits;
mod observed;
pub mod parity;
mod quantised;
mod rotary;
mod single;
mod training;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use half::f16;
use mp_train::backend::cpu::Cpu;
use mp_train::backend::cuda::Cuda;
use mp_train::backend::{Backend, BackendError};
use mp_train::config::run::{Device, Precision};

use case::{Case, Family};
pub use compare::Errors;
use compare::Report;

/// Whatever goes wrong outside of a comparison; it fails the case.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A backend that the cases run on.
pub trait Golden: Backend + Sized {
    /// As `GOLDEN_BACKEND` has it.
    const NAME: &'static str;
    /// How it stores activations: what limits hold.
    const PRECISION: Precision;
    /// Where the program finds it.
    const DEVICE: Device;

    /// The device, with `threads` compute threads where it has such.
    fn open(threads: usize) -> Result<Self, BackendError>;

    /// Factor on the loss. Gradients of half precision would else be rounded where numbers are sparse.
    fn loss_scale() -> f32 {
        match Self::PRECISION {
            Precision::F32 => 1.0,
            Precision::F16 => 1024.0,
        }
    }
}

impl Golden for Cpu<f32> {
    const NAME: &'static str = "cpu-f32";
    const PRECISION: Precision = Precision::F32;
    const DEVICE: Device = Device::Cpu;

    fn open(threads: usize) -> Result<Self, BackendError> {
        Cpu::new(threads)
    }
}

impl Golden for Cpu<f16> {
    const NAME: &'static str = "cpu-f16";
    const PRECISION: Precision = Precision::F16;
    const DEVICE: Device = Device::Cpu;

    fn open(threads: usize) -> Result<Self, BackendError> {
        Cpu::new(threads)
    }
}

impl Golden for Cuda {
    const NAME: &'static str = "cuda";
    const PRECISION: Precision = Precision::F16;
    const DEVICE: Device = Device::Cuda(0);

    fn open(_threads: usize) -> Result<Self, BackendError> {
        Cuda::new(0)
    }
}

type Procedure = fn(&Family, &Case, &mut Report<'_>) -> Outcome<()>;

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

/// How a folder's cases went on a backend.
pub struct Verdict {
    /// The names of the cases that failed.
    pub failed: Vec<String>,
    /// Of every tensor.
    pub errors: Errors,
}

/// What is run, and against what.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// The family.
    pub folder: &'a Path,
    /// These cases, separated by commas, instead of all.
    pub cases: Option<&'a str>,
    /// The errors of the same cases on the CPU in f16, which a GPU is held against.
    pub cpu_errors: Option<&'a Errors>,
}

/// Runs the cases of a folder and hands each line to `say`.
pub fn run<B: Golden>(scope: Scope<'_>, say: &mut dyn FnMut(&str)) -> Outcome<Verdict> {
    let Scope {
        folder,
        cases,
        cpu_errors,
    } = scope;
    let mut family = Family::open(folder)?;
    if let Some(cases) = cases {
        family.cases = cases.split(',').map(str::to_owned).collect();
    }
    say(&format!(
        "\n{}: {} cases on {}",
        folder.display(),
        family.cases.len(),
        B::NAME
    ));
    let report = |case: &str| Report::new(case, B::PRECISION, cpu_errors);
    let (mut failed, mut errors) = (Vec::new(), Errors::default());
    if family.cases.is_empty() {
        say("FAIL: the manifest has no case");
        failed.push("manifest".to_owned());
    }
    for name in &family.cases {
        let mut report = report(name);
        if let Err(error) = run_case::<B>(&family, name, &mut report) {
            report.fail(error.to_string());
        }
        report.lines().iter().for_each(|line| say(line));
        if report.failed() {
            failed.push(name.clone());
        }
        report.into_errors(&mut errors);
    }
    let mut report = report("model_bin");
    report.same("as_model", family.model_bin_difference()?);
    report.lines().iter().for_each(|line| say(line));
    if report.failed() {
        failed.push("model_bin".to_owned());
    }
    for file in family.stray_files()? {
        say(&format!("{file} - - FAIL (no case of the manifest)"));
        failed.push(file);
    }
    Ok(Verdict { failed, errors })
}

fn run_case<B: Golden>(family: &Family, name: &str, report: &mut Report<'_>) -> Outcome<()> {
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
