//! Where the time of a step goes: by stage, by kind of work, and against what the schedule's simulator
//! makes of the times of its actions.

use serde::Serialize;

use super::result::Seconds;
use crate::pipeline::profile::{StepProfile, WorkSeconds};
use crate::pipeline::schedule::{ActionTimes, Schedule, Transfers};

/// What steps measured from within show. They come after the counted ones, so that timers never touch
/// those.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Profiled {
    /// From the first stage's beginning to the last stage's end.
    pub step_seconds: Seconds,
    /// Share of the time of all stages in which a stage runs no action, 0 to 1, in the middle of the
    /// measured steps.
    pub bubble: f64,
    /// Per stage, seconds by what they were spent on, in that step.
    pub work_seconds: Vec<WorkSeconds>,
    /// What the schedule's simulator makes of the times of the actions; nothing where micro-batches
    /// differ, since it takes all for alike.
    pub prediction: Option<Predicted>,
}

/// A step as the schedule's simulator has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Predicted {
    /// What the step takes.
    pub step_seconds: f64,
    /// Share of idle time over all stages, 0 to 1.
    pub bubble: f64,
    /// The times that it was fed with, medians over the measured steps.
    pub action_seconds: ActionTimes,
}

impl Profiled {
    /// Of the measured steps of a schedule, whose micro-batches are `alike` or not; nothing where there
    /// are no steps.
    pub fn of(
        schedule: &Schedule,
        profiles: &[StepProfile],
        transfers: Transfers,
        alike: bool,
    ) -> Option<Self> {
        let typical = typical(profiles)?;
        Some(Profiled {
            step_seconds: Seconds::of(profiles.iter().map(|profile| profile.seconds).collect()),
            bubble: typical.bubble(),
            work_seconds: typical.stages.iter().map(|stage| stage.work).collect(),
            prediction: alike.then(|| Predicted::of(schedule, profiles, transfers)),
        })
    }
}

impl Predicted {
    fn of(schedule: &Schedule, profiles: &[StepProfile], transfers: Transfers) -> Self {
        let times = schedule.action_times(profiles);
        let prediction = schedule.predict_measured(transfers, &times);
        let stages = prediction.idle.len().max(1) as f64;
        Predicted {
            step_seconds: prediction.step_seconds,
            bubble: prediction.idle.iter().sum::<f64>() / stages,
            action_seconds: times,
        }
    }
}

/// The step whose time is in the middle.
pub fn typical(profiles: &[StepProfile]) -> Option<&StepProfile> {
    let mut by_time: Vec<&StepProfile> = profiles.iter().collect();
    by_time.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    by_time.get(by_time.len().saturating_sub(1) / 2).copied()
}
