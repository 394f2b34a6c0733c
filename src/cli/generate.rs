//! `mp-train generate`.

use std::io;
use std::sync::atomic::Ordering;

use super::args::GenerateArgs;
use super::failure::{Failure, FailureClass};
use super::prompts::{self, Answers};
use super::signals;
use crate::config::generate::{GenerateOptions, Prompt};
use crate::generate::{GenerateError, Outcome};

pub(super) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let options = options(args)?;
    let prompts = prompts::read(&args.input)?;
    let mut answers = Answers::create(&args.output)?;
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let mut failed: Option<io::Error> = None;
    let mut emit = |prompt: &Prompt, new_tokens: &[u32]| {
        if let Err(error) = answers.write(prompt, new_tokens) {
            failed.get_or_insert(error);
            stop.store(true, Ordering::Relaxed);
        }
    };
    let outcome = crate::generate::run(&options, &prompts, &mut emit, &stop);
    match (outcome, failed) {
        (Err(error), _) => Err(error.into()),
        // A reader that has seen enough (`| head`) is no error.
        (Ok(_), Some(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        (Ok(_), Some(error)) => Err(Failure::new(FailureClass::Machine, &error)
            .hint("the answers could not be written: check the free space")),
        (Ok(Outcome::Finished), None) => answers.finish(),
        (Ok(Outcome::Interrupted), None) => Err(Failure::interrupted(
            "stopped before the last prompt was answered",
        )),
    }
}

fn options(args: &GenerateArgs) -> Result<GenerateOptions, Failure> {
    let stages = args.devices.len();
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
    let defaults = GenerateOptions::new(args.model.clone(), args.devices.clone());
    Ok(GenerateOptions {
        adapter: args.adapter.clone(),
        precision: args.precision.unwrap_or(defaults.precision),
        balance: args
            .balance
            .as_ref()
            .map(|blocks| blocks.iter().map(|n| *n as usize).collect()),
        threads: args.threads.map_or(defaults.threads, |n| n as usize),
        max_new_tokens: args.max_new_tokens as usize,
        stop_at_eop: !args.no_stop_at_eop,
        ..defaults
    })
}

impl From<GenerateError> for Failure {
    fn from(error: GenerateError) -> Self {
        Failure::new(error.class(), &error)
    }
}
