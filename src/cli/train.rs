//! `mp-train [train]`.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::args::TrainArgs;
use super::failure::{Failure, FailureClass};
use super::{WHERE_TO_GET_A_MODEL, print, signals};
use crate::checkpoint::run_state;
use crate::data::DataError;
use crate::pipeline::base::StartError;
use crate::pipeline::failure::Cause;
use crate::report::metrics::{self, Metrics};
use crate::report::progress::{Progress, Style};
use crate::report::tensorboard::EventFile;
use crate::report::{Event, MemoryReport, RunStarted, StepReport, ValidationReport};
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
        files: None,
        failed: None,
        stop: &stop,
    };
    let mut reporter = |event: Event| {
        progress.show(&event);
        recorder.record(&event);
    };
    let outcome = crate::train::run(&config, &mut reporter, &stop);
    match (outcome, recorder.failed) {
        (Err(error), _) => {
            let ended_a_run = error.ends_a_run();
            let failure = Failure::from(error);
            Err(match ended_a_run {
                true => failure.last_line(resume_line(&config.run.output)),
                false => failure,
            })
        }
        (Ok(_), Some(error)) => Err(Failure::new(FailureClass::Machine, error.as_ref())
            .hint("check the output folder's permissions and free space")
            .last_line(resume_line(&config.run.output))),
        (Ok(Outcome::Finished), None) => Ok(()),
        (Ok(Outcome::InterruptedBeforeStart), None) => Err(Failure::interrupted(
            "stopped while model and data were opened; nothing was trained",
        )),
        (Ok(Outcome::Interrupted { step }), None) => Err(Failure::interrupted(format!(
            "stopped after step {step}; a checkpoint is saved"
        ))
        .hint("the same command with --resume continues")),
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        let failure = Failure::new(error.class(), &error);
        match &error {
            TrainError::Start(StartError::Data(data)) | TrainError::Data(data) => {
                with_data_hint(failure, data)
            }
            TrainError::Start(StartError::Failure(stage)) | TrainError::Failure(stage) => {
                match stage.cause {
                    Cause::Stalled { .. } => failure.hint(
                        "if it is slow and not hung, give it more time: --stall-timeout SECONDS",
                    ),
                    _ => failure,
                }
            }
            _ => failure,
        }
    }
}

/// The failure with what to do about rows that cannot be used.
pub(super) fn with_data_hint(failure: Failure, data: &DataError) -> Failure {
    match data {
        DataError::Row { .. } => {
            failure.hint("mend this row, or leave such rows out with --bad-rows skip")
        }
        DataError::Broken { .. } => {
            failure.hint("the file cannot be read on from this place: mend it")
        }
        _ => failure,
    }
}

/// How long looking for the checkpoint to name may take: a run that failed ends soon.
const SEARCH_LIMIT: Duration = Duration::from_secs(3);

/// Which checkpoint a run that failed can be resumed from.
fn resume_line(output: &Path) -> String {
    let (found, search) = mpsc::channel();
    let folder = output.to_owned();
    // The checkpoint is verified, which takes long where it is large; the process does not wait for it.
    std::thread::spawn(move || found.send(run_state::latest_checkpoint(&folder)));
    let output = output.display();
    match search.recv_timeout(SEARCH_LIMIT) {
        Ok(Ok(latest)) => match latest.path {
            Some(path) => format!("resume with --resume {}", path.display()),
            None => format!("there is no checkpoint in {output} yet to resume from"),
        },
        Ok(Err(error)) => format!("the checkpoints in {output} cannot be listed: {error}"),
        Err(_) => format!("resume with --resume: the newest whole checkpoint in {output} is taken"),
    }
}

/// Keeps `metrics.jsonl`, `validation.jsonl` and the TensorBoard events. A run whose metrics cannot be written is stopped in good order, with a
/// checkpoint, before more work goes unrecorded.
struct Recorder<'a> {
    files: Option<Files>,
    failed: Option<Box<dyn Error>>,
    stop: &'a AtomicBool,
}

/// The files that a run's numbers go to.
struct Files {
    output: PathBuf,
    steps: Metrics,
    validation: Metrics,
    tensorboard: EventFile,
}

impl Files {
    fn open(run: &RunStarted) -> Result<Self, Box<dyn Error>> {
        Ok(Files {
            output: run.output.clone(),
            steps: Metrics::open(&run.output, metrics::STEPS, run.start_step)?,
            validation: Metrics::open(&run.output, metrics::VALIDATION, run.start_step)?,
            tensorboard: EventFile::create(&run.output)?,
        })
    }

    fn step(&mut self, report: &StepReport) -> Result<(), Box<dyn Error>> {
        self.steps.append(report)?;
        let scalars = [
            ("train/loss", report.loss),
            ("train/learning_rate", report.learning_rate as f32),
            ("train/grad_norm", report.grad_norm),
        ];
        Ok(self.tensorboard.scalars(report.step, &scalars)?)
    }

    fn memory(&mut self, report: &MemoryReport) -> Result<(), Box<dyn Error>> {
        let mut rows = Metrics::open(&self.output, metrics::MEMORY, report.step)?;
        Ok(rows.append(report)?)
    }

    fn validation(&mut self, report: &ValidationReport) -> Result<(), Box<dyn Error>> {
        self.validation.append(report)?;
        let scalars = [("validation/loss", report.loss)];
        Ok(self.tensorboard.scalars(report.step, &scalars)?)
    }
}

impl Recorder<'_> {
    fn record(&mut self, event: &Event) {
        let result = match (event, &mut self.files) {
            (Event::RunStarted(run), _) => Files::open(run).map(|files| self.files = Some(files)),
            (Event::Step(report), Some(files)) => files.step(report),
            (Event::Validation(report), Some(files)) => files.validation(report),
            (Event::Memory(report), Some(files)) => files.memory(report),
            _ => Ok(()),
        };
        if let Err(error) = result {
            self.files = None;
            self.failed.get_or_insert(error);
            self.stop.store(true, Ordering::Relaxed);
        }
    }
}
