//! `mp-train [train]`.

use std::sync::atomic::{AtomicBool, Ordering};

use super::args::TrainArgs;
use super::failure::{Failure, FailureClass};
use super::{WHERE_TO_GET_A_MODEL, print, signals};
use crate::report::Event;
use crate::report::metrics::{Metrics, MetricsError};
use crate::report::progress::{Progress, Style};
use crate::train::{Outcome, TrainError};

pub(super) fn run(args: &TrainArgs) -> Result<(), Failure> {
    if args.config.is_bare() {
        let nothing = "no model to train: neither --model nor --config was given";
        return Err(Failure::user(nothing).hint(WHERE_TO_GET_A_MODEL));
    }
    let config = args.config.resolve()?;
    if args.print_config {
        return print(&config.to_toml()?);
    }
    let stop = signals::stop_flag().map_err(|error| Failure::new(FailureClass::Machine, &error))?;
    let style = Style::for_stderr(args.quiet);
    let mut progress = Progress::new(std::io::stderr(), style, config.run.log_steps);
    let mut recorder = Recorder {
        metrics: None,
        failed: None,
        stop: &stop,
    };
    let mut reporter = |event: Event| {
        progress.show(&event);
        recorder.record(&event);
    };
    let outcome = crate::train::run(&config, &mut reporter, &stop);
    match (outcome, recorder.failed) {
        (Err(error), _) => Err(error.into()),
        (Ok(_), Some(error)) => Err(error.into()),
        (Ok(Outcome::Finished), None) => Ok(()),
        (Ok(Outcome::Interrupted { step }), None) => Err(Failure::interrupted(format!(
            "stopped after step {step}; a checkpoint is saved"
        ))
        .hint("the same command with --resume continues")),
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Failure::new(error.class(), &error)
    }
}

/// Keeps `metrics.jsonl`. A run whose metrics cannot be written is stopped in good order, with a
/// checkpoint, before more work goes unrecorded.
struct Recorder<'a> {
    metrics: Option<Metrics>,
    failed: Option<MetricsError>,
    stop: &'a AtomicBool,
}

impl Recorder<'_> {
    fn record(&mut self, event: &Event) {
        let result = match (event, &mut self.metrics) {
            (Event::RunStarted(run), _) => Metrics::open(&run.output, run.start_step)
                .map(|metrics| self.metrics = Some(metrics)),
            (Event::Step(report), Some(metrics)) => metrics.append(report),
            _ => Ok(()),
        };
        if let Err(error) = result {
            self.metrics = None;
            self.failed.get_or_insert(error);
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}
