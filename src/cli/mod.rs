//! The command line: parse, call, print errors and hints, choose the exit code.

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::{Failure, FailureClass};

use crate::backend::{any_left_behind, cuda};

mod adapter_settings;
mod args;
mod bench;
mod chat;
mod check;
mod demo;
mod devices;
mod eval;
mod export;
pub mod failure;
mod generate;
mod plan;
mod prompts;
mod signals;
mod train;

const WHERE_TO_GET_A_MODEL: &str = "\
download the ChatGLM-6B folder (config.json, ice_text.model and the weights, 13 GB) from
      https://huggingface.co/THUDM/chatglm-6b into models/chatglm-6b, then for example
      mp-train --model models/chatglm-6b --train data/train.jsonl --max-steps 1000 --devices cpu,cpu";

/// Runs the command that `args` (the program's name first) asks for. Everything that goes wrong is
/// told on standard error: exit code 0 done, 2 the user can fix it, 1 machine or bug, 3 training
/// diverged, 130 interrupted.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(usage) => {
            // Help and version come this way too, to standard output and with code 0.
            let _ = usage.print();
            return ExitCode::from(if usage.use_stderr() { 2 } else { 0 });
        }
    };
    if let Ok(program) = std::env::current_exe() {
        cuda::probe_by(program);
    }
    let result = match cli.command {
        None => train::run(&cli.train),
        Some(Command::Train(args)) => train::run(&args),
        Some(Command::Plan(args)) => plan::run(&args),
        Some(Command::Check(args)) => check::run(&args),
        Some(Command::Generate(args)) => generate::run(&args),
        Some(Command::Eval(args)) => eval::run(&args),
        Some(Command::Chat(args)) => chat::run(&args),
        Some(Command::Demo(args)) => demo::run(&args),
        Some(Command::Bench(args)) => bench::run(&args),
        Some(Command::Export(args)) => export::run(&args),
        Some(Command::Devices) => devices::run(),
        Some(Command::Probe { pairs }) => devices::probe(&pairs),
    };
    let code = match result {
        Ok(()) => 0,
        Err(failure) => failure.report(),
    };
    leave(code)
}

/// The end of the process.
///
/// A thread that was left behind hangs in a call of a driver, and holds locks of it. What libraries do when
/// a process ends in the ordinary way, above all those of CUDA, can wait for these locks for ever: such a
/// process ends without them. Files are whole: all were closed by those who wrote them.
fn leave(code: u8) -> ExitCode {
    if any_left_behind() {
        // Standard error is not buffered.
        let _ = std::io::stdout().flush();
        signal_hook::low_level::exit(i32::from(code));
    }
    ExitCode::from(code)
}

/// Writes a command's result to standard output. A reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(FailureClass::Machine, &error))
        }
        _ => Ok(()),
    }
}
