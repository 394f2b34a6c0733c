//! `mp-train`, the program.

use std::process::ExitCode;

fn main() -> ExitCode {
    mp_train::cli::main(std::env::args_os())
}
