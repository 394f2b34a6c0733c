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
mod manifest;
mod names;
mod observed;
pub mod parity;
mod quantised;
mod rotary;
mod series;
mod single;
mod trained;
mod training;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use half::f16;
use mp_train::backend::cpu::Cpu;
use mp_train::backend::cuda::Cuda;
use mp_train::backend::{Backend, BackendError};
use mp_train::config::model::ModelConfig;
use mp_train::config::run::{Device, Precision, ProductSums};

use case::{Case, Family, Variant};
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
        "forward" | "forward_right_pad_masked" | "forward_rope_ratio" => forward::right_padded::<B>,
        "forward_left_pad" => forward::left_padded::<B>,
        "forward_explicit_mask" => forward::explicit_mask::<B>,
        "layer_trace" => forward::unpadded::<B>,
        "lora_qkv" | "lora_attn" | "lora_all" => trained::lora::<B>,
        "lora_train" | "lora_train_all" => trained::lora::<B>,
        "ptuning" | "ptuning_plain" | "ptuning_projection" => trained::prefix::<B>,
        "ptuning_train" | "ptuning_projection_train" => trained::prefix::<B>,
        "ptuning_train_plain" | "ptuning_train_projection" => trained::prefix::<B>,
        "full_finetune" | "full_finetune_train" => trained::full::<B>,
        "full_finetune_tied" => trained::tied::<B>,
        "quant_int8" | "quant_int4" => quantised::run::<B>,
        "generate_greedy" | "generate_greedy_prefix" => generate::run::<B>,
        "rotary" => rotary::two_dimensional,
        "rope" => rotary::interleaved::<B>,
        _ => return None,
    })
}

/// How a folder's cases went on a backend.
pub struct Verdict {
    ran: Vec<String>,
    /// The names of the cases that failed.
    pub failed: Vec<String>,
    /// Of every tensor.
    pub errors: Errors,
}

impl Verdict {
    /// Whether a case of this name was run.
    pub fn ran(&self, case: &str) -> bool {
        self.ran.iter().any(|ran| ran == case)
    }
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
    /// What products of the linear layers are summed in, where the backend has a choice.
    pub product_sums: ProductSums,
}

/// Runs the cases of a folder and hands each line to `say`.
pub fn run<B: Golden>(scope: Scope<'_>, say: &mut dyn FnMut(&str)) -> Outcome<Verdict> {
    let Scope {
        folder,
        cases,
        cpu_errors,
        product_sums,
    } = scope;
    let mut family = Family::open(folder)?;
    family.product_sums = product_sums;
    // Of cases that another family has, nothing is said here.
    let asked: Option<Vec<&str>> = cases.map(|cases| cases.split(',').collect());
    let wanted = |case: &&str| asked.as_ref().is_none_or(|asked| asked.contains(case));
    let chosen: Vec<&str> = family.cases().filter(wanted).collect();
    say(&format!(
        "\n{}: {} cases on {}",
        folder.display(),
        chosen.len(),
        B::NAME
    ));
    let mut run = Run {
        cpu_errors,
        failed: Vec::new(),
        errors: Errors::default(),
        say,
    };
    if family.cases().next().is_none() {
        (run.say)("FAIL: the manifest has no case");
        run.failed.push("manifest".to_owned());
    }
    for name in &chosen {
        run.case::<B>(&family, name, name);
    }
    for variant in family.variants()? {
        run.variant::<B>(&family, &variant, &chosen)?;
    }
    if asked.is_none() {
        for name in family.untouched()? {
            (run.say)(&format!("{name} - - FAIL (nothing reads it)"));
            run.failed.push(name);
        }
    }
    let Run { failed, errors, .. } = run;
    Ok(Verdict {
        ran: chosen.into_iter().map(str::to_owned).collect(),
        failed,
        errors,
    })
}

/// A run on its way.
struct Run<'a> {
    cpu_errors: Option<&'a Errors>,
    failed: Vec<String>,
    errors: Errors,
    say: &'a mut dyn FnMut(&str),
}

impl Run<'_> {
    /// A case on a model, reported under `title`.
    fn case<B: Golden>(&mut self, family: &Family, name: &str, title: &str) {
        let mut report = Report::new(title, B::PRECISION, self.cpu_errors);
        report = report.with_sums(family.product_sums);
        if let Err(error) = run_case::<B>(family, name, &mut report) {
            report.fail(error.to_string());
        }
        self.finish(title, report);
    }

    /// The model from another folder: the same tensors; or where they go by other names, the same
    /// results of all cases that train nothing.
    fn variant<B: Golden>(
        &mut self,
        family: &Family,
        variant: &Variant,
        cases: &[&str],
    ) -> Outcome<()> {
        let naming = |config: &ModelConfig| config.architecture.naming;
        if naming(&variant.config) == naming(&family.config) {
            let mut report = Report::new(&variant.name, B::PRECISION, None);
            report.same("as_model", family.difference(variant)?);
            self.finish(&variant.name, report);
            return Ok(());
        }
        let renamed = family.with_model(variant)?;
        let untrained = |case: &&&str| {
            let kinds = ["forward", "layer_trace", "generate_greedy"];
            kinds.iter().any(|kind| case.starts_with(kind))
        };
        for name in cases.iter().filter(untrained) {
            self.case::<B>(&renamed, name, &format!("{name}@{}", variant.name));
        }
        Ok(())
    }

    fn finish(&mut self, title: &str, report: Report<'_>) {
        report.lines().iter().for_each(|line| (self.say)(line));
        if report.failed() {
            self.failed.push(title.to_owned());
        }
        report.into_errors(&mut self.errors);
    }
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
