//! `mp-train demo`.

use std::io::Write;
use std::path::Path;

use super::args::DemoArgs;
use super::failure::{Failure, FailureClass};
use super::{print, signals};
use crate::demo::{DemoError, DemoOptions, Event, Outcome};
use crate::report;
use crate::report::progress::{Progress, Style};

/// A progress line every this many steps.
const LOG_STEPS: u64 = 50;

pub(super) fn run(args: &DemoArgs) -> Result<(), Failure> {
    let cores = || std::thread::available_parallelism().map_or(1, |n| n.get().min(4_096));
    let options = DemoOptions {
        output: args.output.clone(),
        seed: args.seed,
        threads: args.threads.map_or_else(cores, |n| n as usize),
    };
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let mut progress = Progress::new(std::io::stderr(), Style::for_stderr(false), LOG_STEPS);
    let mut show = |event: Event| match event {
        // The last step of a run ends its line. Whoever closed standard error wants no progress.
        Event::Part(text) => drop(writeln!(std::io::stderr(), "{text}")),
        // Of the runs themselves the steps are enough here.
        Event::Training(event @ (report::Event::Step(_) | report::Event::Warning(_))) => {
            progress.show(&event);
        }
        Event::Training(_) => {}
    };
    let findings = match crate::demo::run(&options, &mut show, &stop)? {
        Outcome::Finished(findings) => findings,
        Outcome::Interrupted => {
            return Err(Failure::interrupted("the demo is not complete")
                .hint("the same command starts it anew"));
        }
    };
    drop(progress);
    print(&format!("\n{}", findings.to_text()))?;
    if !findings.passed() {
        return Err(Failure::from(DemoError::NotLearned).hint(
            "try another --seed; if that fails too, something is wrong with this build, and \
             `cargo test --release` should say what",
        ));
    }
    print(&what_next(&args.output))
}

fn what_next(output: &Path) -> String {
    let output = output.display();
    format!(
        "\nEverything is in {output}: questions.json, answers.json, base/model, lora/adapter, \
         ptuning/adapter. Talk to one of them:\n\n    \
         mp-train chat --model {output}/base/model --adapter {output}/lora/adapter --temperature 0\n"
    )
}

impl From<DemoError> for Failure {
    fn from(error: DemoError) -> Self {
        Failure::new(error.class(), &error)
    }
}
