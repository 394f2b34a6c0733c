//! A schedule against a clock: the printed grid and the share of idle time.

use std::fmt::Write;

use super::{Action, Schedule};

/// When every action of every stage runs, in time units from 0.
struct Timeline {
    /// Per stage, (action, first unit, one past its last unit).
    stages: Vec<Vec<(Action, usize, usize)>>,
    /// One past the last unit of all.
    end: usize,
}

impl Schedule {
    /// Draws the schedule: a row per stage, a column per time unit. `F3` and `B3` mark the unit in
    /// which an action begins, `--` those in which it goes on, `.` an idle one.
    ///
    /// Costs are in time units, at least 1; transfers take none. Of a schedule that does not
    /// validate only those actions are drawn that can run.
    pub fn grid(&self, forward_cost: usize, backward_cost: usize) -> String {
        let timeline = self.timeline(forward_cost, backward_cost);
        let width = 1 + self.micro_batches.saturating_sub(1).to_string().len();
        let label = self.stages.len().saturating_sub(1).to_string().len();
        let mut text = String::new();
        for (rank, actions) in timeline.stages.iter().enumerate() {
            let mut cells = vec![".".to_owned(); timeline.end];
            for &(action, start, end) in actions {
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

    /// Share of stage time in which nothing runs, 0 to 1: `(p - 1) / (m + p - 1)` for 1f1b and for
    /// gpipe, whatever the two costs are, as long as all stages cost the same.
    pub fn idle_fraction(&self, forward_cost: usize, backward_cost: usize) -> f64 {
        let timeline = self.timeline(forward_cost, backward_cost);
        let busy: usize = timeline
            .stages
            .iter()
            .flatten()
            .map(|(_, start, end)| end - start)
            .sum();
        let total = timeline.end * timeline.stages.len();
        if total == 0 {
            return 0.0;
        }
        (total - busy) as f64 / total as f64
    }

    /// Every action as early as its stage and its input allow.
    fn timeline(&self, forward_cost: usize, backward_cost: usize) -> Timeline {
        let count = self.stages.len();
        let mut stages: Vec<Vec<(Action, usize, usize)>> = vec![Vec::new(); count];
        // When the output of F and B of each micro-batch is there, per stage.
        let mut ready = vec![vec![[None; 2]; self.micro_batches]; count];
        let place = |action: Action| match action {
            Action::Forward(_) => (0, forward_cost.max(1)),
            Action::Backward(_) => (1, backward_cost.max(1)),
        };
        let mut moved = true;
        while moved {
            moved = false;
            for rank in 0..count {
                while let Some(&action) = self.stages[rank].get(stages[rank].len()) {
                    let (direction, cost) = place(action);
                    let input = match self.source(rank, action) {
                        None => Some(0),
                        Some(source) => ready[source]
                            .get(action.micro_batch())
                            .and_then(|outputs| outputs[direction]),
                    };
                    let Some(input) = input else { break };
                    let free = stages[rank].last().map_or(0, |&(_, _, end)| end);
                    let start = free.max(input);
                    if let Some(outputs) = ready[rank].get_mut(action.micro_batch()) {
                        outputs[direction] = Some(start + cost);
                    }
                    stages[rank].push((action, start, start + cost));
                    moved = true;
                }
            }
        }
        let ends = stages.iter().filter_map(|actions| actions.last());
        let end = ends.map(|&(_, _, end)| end).max().unwrap_or(0);
        Timeline { stages, end }
    }
}
