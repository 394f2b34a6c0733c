//! Schedules and partitions: properties over all sizes, and the validator against planted faults.
#![allow(clippy::unwrap_used)]

use mp_train::config::run::ScheduleKind;
use mp_train::pipeline::schedule::Schedule;

#[path = "schedule/executor.rs"]
mod executor;
#[path = "schedule/faults.rs"]
mod faults;
#[path = "schedule/fit.rs"]
mod fit;
#[path = "schedule/partition.rs"]
mod partition;
#[path = "schedule/programs.rs"]
mod programs;
#[path = "schedule/timeline.rs"]
mod timeline;

const MOST_STAGES: usize = 28;
const MOST_MICRO_BATCHES: usize = 64;

/// Every schedule that there is for these stages and micro-batches, with as many chunks as 28 blocks
/// can be cut into.
fn schedules(stages: usize, micro_batches: usize) -> Vec<Schedule> {
    let build = |kind, virtual_stages| Schedule::build(kind, stages, virtual_stages, micro_batches);
    let mut all = vec![
        build(ScheduleKind::OneForwardOneBackward, 1).unwrap(),
        build(ScheduleKind::Gpipe, 1).unwrap(),
    ];
    if micro_batches.is_multiple_of(stages) {
        let most = MOST_STAGES / stages;
        let interleaved = |v| build(ScheduleKind::Interleaved, v).unwrap();
        all.extend((1..=most).map(interleaved));
    }
    all
}

/// Calls `check` with every schedule of up to 28 stages and 64 micro-batches, and its name.
fn for_all_schedules(check: impl Fn(&Schedule, &str)) {
    for stages in 1..=MOST_STAGES {
        for micro_batches in 1..=MOST_MICRO_BATCHES {
            for schedule in schedules(stages, micro_batches) {
                check(&schedule, &name(&schedule));
            }
        }
    }
}

fn name(schedule: &Schedule) -> String {
    format!(
        "{:?}, {} stages, {} chunks, {} micro-batches",
        schedule.kind,
        schedule.stages.len(),
        schedule.virtual_stages,
        schedule.micro_batches
    )
}
