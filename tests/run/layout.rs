//! Ways to lay out one and the same run, none of which may change a bit of it.

use std::process::Command;

/// Number of stages, schedule, recomputation, threads.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub stages: usize,
    pub schedule: &'static str,
    pub recompute: &'static str,
    pub threads: usize,
}

const SCHEDULES: [&str; 2] = ["1f1b", "gpipe"];
const RECOMPUTE: [&str; 3] = ["none", "attention_free", "block"];

/// Three layouts for each number of stages up to `most_stages`, so chosen that every schedule, every
/// recomputation and 1, 2 and 3 threads occur with every number of stages, in changing company.
pub fn covering(most_stages: usize) -> Vec<Layout> {
    let layout = |stages: usize, turn: usize| Layout {
        stages,
        schedule: SCHEDULES[(turn + stages) % 2],
        recompute: RECOMPUTE[(turn + stages) % 3],
        threads: (turn + 2 * stages) % 3 + 1,
    };
    let stages = 1..=most_stages;
    stages
        .flat_map(|stages| (0..3).map(move |turn| layout(stages, turn)))
        .collect()
}

impl Layout {
    pub fn new(
        stages: usize,
        schedule: &'static str,
        recompute: &'static str,
        threads: usize,
    ) -> Self {
        Layout {
            stages,
            schedule,
            recompute,
            threads,
        }
    }

    /// The flags that ask for it.
    pub fn add_to(self, command: &mut Command) {
        command
            .args(["--devices", &vec!["cpu"; self.stages].join(",")])
            .args(["--schedule", self.schedule])
            .args(["--recompute", self.recompute])
            .args(["--threads", &self.threads.to_string()]);
    }
}

#[test]
fn a_covering_holds_everything_with_every_number_of_stages() {
    for most_stages in 1..=4 {
        let layouts = covering(most_stages);
        for stages in 1..=most_stages {
            let here = || layouts.iter().filter(move |layout| layout.stages == stages);
            assert!(SCHEDULES.iter().all(|s| here().any(|l| l.schedule == *s)));
            assert!(RECOMPUTE.iter().all(|r| here().any(|l| l.recompute == *r)));
            assert!((1..=3).all(|threads| here().any(|l| l.threads == threads)));
        }
    }
}
