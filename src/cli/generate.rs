//! `mp-train generate`.

use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;

use super::args::{GenerateArgs, ModelArgs, SamplingArgs};
use super::failure::{Failure, FailureClass};
use super::prompts::{self, Answers};
use super::signals;
use crate::config::generate::{GenerateOptions, Sampling};
use crate::config::run::Device;
use crate::generate::template_file::Asking;
use crate::generate::{Answer, GenerateError, Notice, Outcome};

pub(super) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let sampling = sampling(&args.sampling, greedy_unless_asked(&args.sampling))?;
    let options = GenerateOptions {
        max_new_tokens: args.max_new_tokens as usize,
        ..options(&args.model, sampling)?
    };
    // Its contradictions are told by the run itself, if there is text to be asked.
    let (asking, _) = Asking::of(&options).map_err(GenerateError::from)?;
    let (rows, inputs) = prompts::read(&args.input, &asking.settings)?;
    let mut answers = Answers::create(&args.output)?;
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let mut failed: Option<io::Error> = None;
    let mut emit = |index: usize, answer: &Answer| {
        if let Err(error) = answers.write(&rows[index], answer) {
            failed.get_or_insert(error);
            stop.store(true, Ordering::Relaxed);
        }
    };
    let outcome = crate::generate::run(&options, &inputs, &mut emit, &mut warn, &stop);
    match (outcome, failed) {
        (Err(error), _) => Err(located(error, &args.input)),
        // A reader that has seen enough (`| head`) is no error.
        (Ok(_), Some(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        (Ok(_), Some(error)) => Err(Failure::new(FailureClass::Machine, &error).hint(format!(
            "the answers could not be written to {}: check the free space",
            args.output.display()
        ))),
        (Ok(Outcome::Finished), None) => answers.finish(),
        (Ok(Outcome::Interrupted), None) => Err(Failure::interrupted(
            "stopped before the last prompt was answered",
        )),
    }
}

/// The error with the name of the file whose line it is about.
fn located(error: GenerateError, input: &Path) -> Failure {
    let problem = match &error {
        GenerateError::Prompt { problem, .. } => problem.to_string(),
        GenerateError::Row(row) => row.problem.to_string(),
        _ => return error.into(),
    };
    let line = error.line().unwrap_or_default();
    Failure::user(format!("{}:{line}: {problem}", prompts::name(input)))
}

/// Tells what is worth a line.
pub(super) fn warn(notice: Notice) {
    eprintln!("warning: {notice}");
}

/// Where nothing is drawn unless a flag that shapes the drawing is given.
pub(super) fn greedy_unless_asked(args: &SamplingArgs) -> Sampling {
    match args.temperature.is_none() && args.top_k.is_none() && args.top_p.is_none() {
        true => Sampling::greedy(),
        false => Sampling::plain(),
    }
}

/// The flags over the command's defaults.
pub(super) fn sampling(args: &SamplingArgs, defaults: Sampling) -> Result<Sampling, Failure> {
    let sampling = Sampling {
        temperature: args.temperature.unwrap_or(defaults.temperature),
        top_k: args.top_k.map_or(defaults.top_k, |k| k as usize),
        top_p: args.top_p.unwrap_or(defaults.top_p),
        repetition_penalty: args
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
        seed: args.seed.unwrap_or(defaults.seed),
    };
    match sampling.check() {
        Ok(()) => Ok(sampling),
        Err(problem) => Err(Failure::user(format!(
            "--{} {}: must be {}",
            problem.setting.replace('_', "-"),
            problem.found,
            problem.must_be
        ))),
    }
}

/// What the flags say about the model, with the defaults for the rest.
pub(super) fn options(args: &ModelArgs, sampling: Sampling) -> Result<GenerateOptions, Failure> {
    let devices = args
        .devices
        .clone()
        .or_else(|| super::devices::visible_gpus(args.precision))
        .unwrap_or_else(|| vec![Device::Cpu]);
    let stages = devices.len();
    if let Some(balance) = args
        .balance
        .as_ref()
        .filter(|balance| balance.len() != stages)
    {
        let found = balance.len();
        return Err(Failure::user(format!(
            "--balance has {found} numbers for {stages} devices"
        )));
    }
    let defaults = GenerateOptions::new(args.model.clone(), devices);
    let precision = args.precision.unwrap_or(defaults.precision);
    Ok(GenerateOptions {
        adapter: args.adapter.clone(),
        precision,
        quantization: args.quantization.unwrap_or_default(),
        rotary_table: args.rotary_table.unwrap_or(precision.rotary_table()),
        balance: args
            .balance
            .as_ref()
            .map(|blocks| blocks.iter().map(|n| *n as usize).collect()),
        threads: args.threads.map_or(defaults.threads, |n| n as usize),
        stop_at_eop: !args.no_stop_at_eop,
        template: args.template,
        sampling,
        ..defaults
    })
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        Failure::new(error.class(), &error)
    }
}
