//! Where a run computes and writes: devices, memory, the output folder and what is in it.

use std::path::Path;

use rustix::fs::{Access, access, statvfs};

use super::{About, Report};
use crate::config::byte_size::ByteSize;
use crate::config::run::{Resume, RunConfig};
use crate::data::cache::OnProgress;
use crate::data::sampler::SamplerState;
use crate::data::training_data::TrainingData;
use crate::model::trainables::Trainables;
use crate::pipeline::base::check_devices;
use crate::pipeline::prepare::Prepared;
use crate::train::check_resume;

/// Looks for the devices that the run names.
pub(super) fn devices(report: &mut Report, config: &RunConfig) {
    let pipeline = &config.pipeline;
    let found = check_devices(
        &pipeline.devices,
        config.model.precision,
        pipeline.transport,
    );
    if let Err(error) = found {
        report.problem(About::Devices, error);
    }
}

/// Lays the run out on its devices, as it will be, and looks whether it fits.
pub(super) fn layout(report: &mut Report, config: &RunConfig, on_progress: OnProgress<'_>) {
    let prepared = match Prepared::survey(config, SamplerState::default(), on_progress) {
        Ok(prepared) => prepared,
        Err(error) => return report.problem(About::Devices, error),
    };
    let steps = prepared.max_steps;
    let rows = prepared.rows.len().max(1) as f64;
    let per_step = match config.run.micro_batch_tokens {
        Some(_) => None,
        None => Some((config.run.micro_batch_size * config.run.gradient_accumulation) as f64),
    };
    let times = per_step.map_or(String::new(), |per_step| {
        format!(
            ", {:.1} times through the rows",
            steps as f64 * per_step / rows
        )
    });
    let names: Vec<String> = config
        .pipeline
        .devices
        .iter()
        .map(ToString::to_string)
        .collect();
    report.fact(
        About::Devices,
        format!(
            "{} for {steps} steps{times}; micro-batches of up to {} tokens in {} rows",
            names.join(", "),
            prepared.demand.max_rows,
            prepared.demand.max_sequences
        ),
    );
    if let Some(no_room) = prepared.no_room {
        report.problem(About::Devices, no_room);
    }
}

/// Bytes that a checkpoint takes for each trained value: three f32 tensors of its state, and the adapter.
const BYTES_PER_VALUE: u64 = 16;

/// Looks whether the run can write where it is told to, and go on from what it is told to.
pub(super) fn output(
    report: &mut Report,
    config: &RunConfig,
    trainables: Option<&Trainables>,
    rows: Option<&TrainingData>,
) {
    let output = &config.run.output;
    let there = nearest(output);
    if !there.is_dir() {
        let there = there.display();
        let text = format!(
            "{there} is not a folder, so that {} cannot be one",
            output.display()
        );
        report.problem(About::Output, text);
    } else if let Err(error) = access(there, Access::WRITE_OK | Access::EXEC_OK) {
        let text = format!("{} cannot be written to: {error}", there.display());
        report.problem(About::Output, text);
    } else if let Some(trainables) = trainables {
        room(report, config, there, trainables);
    }
    if config.run.resume == Resume::No {
        return;
    }
    let Some(rows) = rows else { return };
    match check_resume(config, &rows.train, &mut |warning| {
        report_warning(report, warning)
    }) {
        Ok(step) => report.fact(About::Output, format!("goes on from step {step}")),
        Err(error) => report.problem(About::Output, error),
    }
}

fn report_warning(report: &mut Report, warning: String) {
    report.warning(About::Output, warning);
}

/// The folder itself, or the nearest above it that exists.
fn nearest(path: &Path) -> &Path {
    let mut here = path;
    while !here.exists() {
        match here.parent() {
            Some(parent) if parent != Path::new("") => here = parent,
            _ => return Path::new("."),
        }
    }
    here
}

/// Compares the free space with what the checkpoints of the run will take.
fn room(report: &mut Report, config: &RunConfig, folder: &Path, trainables: &Trainables) {
    let Ok(space) = statvfs(folder) else { return };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    // One more than is kept: the oldest goes when the newest is whole.
    let kept = match (config.run.save_total_limit as u64, config.run.save_steps) {
        (0, 0) => 1,
        (0, every) => config.run.max_steps.unwrap_or(every) / every + 1,
        (limit, _) => limit + 1,
    };
    let each = BYTES_PER_VALUE * trainables.count() as u64;
    let needed = each.saturating_mul(kept);
    if needed > free {
        report.problem(
            About::Output,
            format!(
                "{kept} checkpoints of {} each need {}, and {} has {} left: keep fewer \
                 (--save-total-limit), or take another folder",
                ByteSize(each),
                ByteSize(needed),
                folder.display(),
                ByteSize(free)
            ),
        );
    }
}
