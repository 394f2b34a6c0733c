//! A schedule against a clock: the printed grid, the share of idle time, the time of a step.

use std::fmt::Write;

use super::{Action, Flow, Schedule, Transfers};

/// What a step is expected to take.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Prediction {
    /// From the first action of all stages to the end of the last.
    pub step_seconds: f64,
    /// Per stage, the share of that time in which it computes nothing, 0 to 1.
    pub idle: Vec<f64>,
}

impl Schedule {
    /// Draws the schedule: a row per stage, a column per time unit. `F3` and `B3` (`F3.1` in the second
    /// chunk) mark the unit in which an action begins, `--` those in which it goes on, `.` an idle one.
    ///
    /// Costs are those of an action, so of one chunk, in time units, at least 1; transfers take none.
    /// Of a schedule that does not validate only those actions are drawn that can run.
    pub fn grid(&self, forward_cost: usize, backward_cost: usize) -> String {
        let costs = [forward_cost.max(1), backward_cost.max(1)];
        let ends = self.ends_in_units(costs);
        let last = ends.iter().flatten().copied().max().unwrap_or(0);
        let actions = self.stages.iter().flatten();
        let width = actions.map(|action| action.to_string().len()).max();
        let width = width.unwrap_or(1);
        let label = self.stages.len().saturating_sub(1).to_string().len();
        let mut text = String::new();
        for (rank, (actions, ends)) in self.stages.iter().zip(&ends).enumerate() {
            let mut cells = vec![".".to_owned(); last];
            for (action, &end) in actions.iter().zip(ends) {
                let start = end - costs[action.flow as usize];
                cells[start..end].fill("-".repeat(width));
                cells[start] = action.to_string();
            }
            let _ = write!(text, "stage {rank:<label$} |");
            for cell in cells {
                let _ = write!(text, " {cell:<width$}");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text
    }

    /// Share of stage time in which nothing runs, 0 to 1, when every action of a flow costs the same on
    /// every stage and transfers take no time. Costs as in [`Schedule::grid`].
    pub fn idle_fraction(&self, forward_cost: usize, backward_cost: usize) -> f64 {
        let costs = [forward_cost.max(1), backward_cost.max(1)];
        let ends = self.ends_in_units(costs);
        let total = ends.iter().flatten().copied().max().unwrap_or(0) * ends.len();
        if total == 0 {
            return 0.0;
        }
        let ran = self.stages.iter().zip(&ends);
        let ran = ran.flat_map(|(actions, ends)| &actions[..ends.len()]);
        let busy: usize = ran.map(|action| costs[action.flow as usize]).sum();
        (total - busy) as f64 / total as f64
    }

    /// The share of idle time that the literature gives, `(p - 1) / (v m + p - 1)`: what
    /// [`Schedule::idle_fraction`] is for every schedule made here, whatever the two costs.
    pub fn bubble(&self) -> f64 {
        let work = (self.virtual_stages * self.micro_batches) as f64;
        let ramp = self.stages.len().saturating_sub(1) as f64;
        if work + ramp == 0.0 {
            return 0.0;
        }
        ramp / (work + ramp)
    }

    /// What a step takes when the forward of chunk `c` of stage `r` takes `forward[r][c]` seconds, its
    /// backward `backward[r][c]`, and a message between stages `transfer` seconds, which hide behind
    /// compute where the programs let them ([`Transfers::Grouped`]). A cost that is not given is 0.
    pub fn predict(
        &self,
        forward: &[Vec<f64>],
        backward: &[Vec<f64>],
        transfer: f64,
    ) -> Prediction {
        let cost = |rank: usize, action: Action| {
            let costs = match action.flow {
                Flow::Forward => forward,
                Flow::Backward => backward,
            };
            let of_stage = costs.get(rank);
            of_stage.map_or(0.0, |chunks| {
                chunks.get(action.chunk).copied().unwrap_or(0.0)
            })
        };
        let ends = self.ends(Transfers::Grouped, |_| 0.0, cost, transfer);
        let step_seconds = ends.iter().flatten().flatten().copied().fold(0.0, f64::max);
        Prediction {
            step_seconds,
            idle: self.idle(step_seconds, cost),
        }
    }

    /// Per stage, the share of `step_seconds` in which it runs none of its actions, of `cost` each.
    pub(super) fn idle(&self, step_seconds: f64, cost: impl Fn(usize, Action) -> f64) -> Vec<f64> {
        let idle = |(rank, actions): (usize, &Vec<Action>)| {
            let busy: f64 = actions.iter().map(|&action| cost(rank, action)).sum();
            match step_seconds > 0.0 {
                true => (1.0 - busy / step_seconds).max(0.0),
                false => 0.0,
            }
        };
        self.stages.iter().enumerate().map(idle).collect()
    }

    /// Per stage, when its actions end in whole units, up to the first that never begins.
    fn ends_in_units(&self, costs: [usize; 2]) -> Vec<Vec<usize>> {
        let cost = |_, action: Action| costs[action.flow as usize] as f64;
        let ends = self.ends(Transfers::Buffered, |_| 0.0, cost, 0.0);
        // Sums of whole numbers: exact.
        let whole = |ends: Vec<Option<f64>>| ends.into_iter().map_while(|end| Some(end? as usize));
        ends.into_iter().map(|ends| whole(ends).collect()).collect()
    }
}
