//! `mp-train plan`: what a run would do and need, before anything is loaded; by the numbers that the run
//! itself uses.

mod layouts;
mod subject;
mod table;

use std::fmt::Write as _;

use crate::config::model_size::ModelSize;
use crate::config::run::{Device, RunConfig};
use crate::pipeline::advice::NoRoom;
use crate::pipeline::base::StartError;
use crate::report::FailureClass;

pub use self::subject::Subject;

/// Columns of a terminal that the plan is drawn for.
const WIDTH: usize = 100;

/// What is planned, and by which assumptions.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// A model of a named size in place of the model folder.
    pub size: Option<ModelSize>,
    /// Tokens of every row, in place of the data.
    pub sequence_length: Option<usize>,
    /// Share of these tokens with a target, 0 to 1.
    pub target_share: f64,
    /// 10^12 operations per second that a device sustains in matrix products.
    pub tflops: f64,
    /// 10^9 bytes per second between two devices.
    pub link_gbps: f64,
}

impl PlanOptions {
    /// What a device is assumed to sustain where nothing is said: 50 on a GPU (a 3090's peak is 71, an
    /// A100's 312), 0.1 on a CPU.
    pub fn usual_tflops(device: Device) -> f64 {
        match device {
            Device::Cpu => 0.1,
            Device::Cuda(_) => 50.0,
        }
    }

    /// What a link is assumed to carry where nothing is said: half of what 16 lanes of PCIe 4.0 could.
    pub const USUAL_LINK_GBPS: f64 = 16.0;
}

/// Why no plan could be made: as for a training run.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Model, data, devices.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A named size, and rows that only a model folder could make sense of.
    #[error(
        "--size {size} has no folder to read rows with: give --sequence-length in place of data"
    )]
    NoRows {
        /// As given.
        size: &'static str,
    },
    /// Rows longer than the model takes.
    #[error("--sequence-length {found}: the model takes 1 to {longest} tokens")]
    SequenceLength {
        /// As asked for.
        found: usize,
        /// Of the model.
        longest: usize,
    },
}

impl PlanError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        match self {
            PlanError::Start(error) if error.is_machine() => FailureClass::Machine,
            _ => FailureClass::User,
        }
    }
}

/// A plan, and what is missing where the run does not fit.
#[derive(Debug)]
pub struct Plan {
    /// For the person at the terminal.
    pub text: String,
    /// What is missing.
    pub no_room: Option<Box<NoRoom>>,
}

/// Plans a run: what each device holds, the schedule, and how other layouts would do.
///
/// # Errors
/// As a training run before its first step, but for one that does not fit.
pub fn make(config: &RunConfig, options: &PlanOptions) -> Result<Plan, PlanError> {
    let subject = Subject::open(config, options)?;
    let mut text = subject.title();
    text.push('\n');
    text.push_str(&table::devices(&subject));
    text.push('\n');
    text.push_str(&grid(&subject));
    text.push('\n');
    text.push_str(&layouts::compare(&subject, options));
    Ok(Plan {
        text,
        no_room: subject.no_room,
    })
}

/// The schedule as a grid, with as many micro-batches as there is room for on a line.
fn grid(subject: &Subject) -> String {
    let full = &subject.layout.schedule;
    let stages = full.stages.len();
    let group = if full.virtual_stages > 1 { stages } else { 1 };
    let drawn = (1..=full.micro_batches / group).rev().find_map(|groups| {
        let count = groups * group;
        let schedule = crate::pipeline::schedule::Schedule::build(
            full.kind,
            stages,
            full.virtual_stages,
            count,
        );
        let text = schedule.ok()?.grid(1, 2);
        let fits = text.lines().all(|line| line.len() <= WIDTH);
        fits.then_some((count, text))
    });
    let all = full.micro_batches;
    match drawn {
        Some((count, grid)) => {
            let of = match count == all {
                true => String::new(),
                false => format!(", drawn with {count} of its {all} micro-batches"),
            };
            format!("one step{of} (a backward twice as long as a forward):\n{grid}")
        }
        None => format!("one step of {all} micro-batches: too wide to draw\n"),
    }
}

/// Joins what fits on lines of the plan's width.
fn wrapped(words: &str) -> String {
    let mut text = String::new();
    let mut column = 0;
    for word in words.split_whitespace() {
        if column > 0 && column + 1 + word.len() > WIDTH {
            text.push('\n');
            column = 0;
        }
        if column > 0 {
            text.push(' ');
            column += 1;
        }
        // Writing to a String cannot fail.
        let _ = write!(text, "{word}");
        column += word.len();
    }
    text.push('\n');
    text
}
