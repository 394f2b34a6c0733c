//! What is to be measured.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::rows::Lengths;
use crate::config::model_size::ModelSize;
use crate::config::run::{
    AdapterSection, Device, Precision, ProductSums, Quantization, Recompute, ScheduleKind,
    TransportKind,
};

/// What to measure.
#[derive(Clone, Debug, Serialize)]
pub struct BenchOptions {
    /// The model.
    pub size: ModelSize,
    /// What is trained.
    pub adapter: AdapterSection,
    /// One stage per entry, in the layout of the most stages; others take the first of them.
    pub devices: Vec<Device>,
    /// Who does what in which order, each measured on its own.
    pub layouts: Vec<LayoutChoice>,
    /// Storage type.
    pub precision: Precision,
    /// Storage of the frozen linear layers.
    pub quantization: Quantization,
    /// What their products are summed in.
    pub product_sums: ProductSums,
    /// Rows of a micro-batch.
    pub micro_batch_size: usize,
    /// Tokens of the rows; half of them have a target.
    pub lengths: Lengths,
    /// What is recomputed.
    pub recompute: Recompute,
    /// Steps that are not counted.
    pub warm_up: usize,
    /// Steps that are counted.
    pub steps: usize,
    /// Steps that are measured from within after them; 0 for none.
    pub profile_steps: usize,
    /// CPU threads of all stages together.
    pub threads: usize,
    /// How activations travel between GPUs.
    pub transport: TransportKind,
}

/// One way to lay out a step over the first devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LayoutChoice {
    /// Stages, one per device.
    pub stages: usize,
    /// Order of forwards and backwards.
    pub schedule: ScheduleKind,
    /// Parts of the model per stage; 1 unless interleaved.
    pub virtual_stages: usize,
    /// Micro-batches of a step.
    pub micro_batches: usize,
}

impl LayoutChoice {
    /// For every number of stages up to `most`: each schedule that exists with that many stages and
    /// micro-batches on a model of `blocks` blocks, interleaved with two parts per stage.
    pub fn all(most: usize, blocks: usize, micro_batches: usize) -> Vec<Self> {
        use ScheduleKind::{Gpipe, Interleaved, OneForwardOneBackward};
        let mut all = Vec::new();
        for stages in 1..=most.min(blocks) {
            let choice = |schedule, virtual_stages| LayoutChoice {
                stages,
                schedule,
                virtual_stages,
                micro_batches,
            };
            all.push(choice(OneForwardOneBackward, 1));
            if stages == 1 {
                // With one stage all schedules are one.
                continue;
            }
            all.push(choice(Gpipe, 1));
            if 2 * stages <= blocks && micro_batches.is_multiple_of(stages) {
                all.push(choice(Interleaved, 2));
            }
        }
        all
    }
}

impl fmt::Display for LayoutChoice {
    /// `2 stages, interleaved x 2, 8 micro-batches`.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = |count: usize| if count == 1 { "" } else { "s" };
        let (stages, count) = (self.stages, self.micro_batches);
        let name = schedule_name(self.schedule);
        write!(out, "{stages} stage{}, {name}", plural(stages))?;
        if self.virtual_stages > 1 {
            write!(out, " x {}", self.virtual_stages)?;
        }
        write!(
            out,
            ", {count} micro-batch{}",
            if count == 1 { "" } else { "es" }
        )
    }
}

/// As it is typed.
pub fn schedule_name(schedule: ScheduleKind) -> &'static str {
    match schedule {
        ScheduleKind::OneForwardOneBackward => "1f1b",
        ScheduleKind::Interleaved => "interleaved",
        ScheduleKind::Gpipe => "gpipe",
    }
}

/// One entry of `--layouts`; what it leaves out is said by the other options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutWord {
    /// Every number of devices, every schedule.
    Auto,
    /// `STAGES[:SCHEDULE][:MICRO_BATCHES]`.
    One {
        /// Stages.
        stages: usize,
        /// Schedule, and parts of the model per stage.
        schedule: Option<(ScheduleKind, Option<usize>)>,
        /// Micro-batches of a step.
        micro_batches: Option<usize>,
    },
}

/// Most stages, parts or micro-batches that are taken for meant.
const MOST: usize = 4_096;

impl FromStr for LayoutWord {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(LayoutWord::Auto);
        }
        let wrong = || {
            format!(
                "`{text}` is no layout: use `auto`, or STAGES[:SCHEDULE][:MICRO_BATCHES] such as 2, \
                 2:gpipe or 2:interleaved2:16 (schedules: 1f1b, gpipe, interleaved; the number behind \
                 the last is that of its parts per stage)"
            )
        };
        let number = |text: &str| -> Option<usize> {
            let number = text.parse().ok()?;
            (1..=MOST).contains(&number).then_some(number)
        };
        let mut parts = text.split(':');
        let stages = parts.next().and_then(number).ok_or_else(wrong)?;
        let (mut schedule, mut micro_batches) = (None, None);
        for part in parts {
            let known = match part {
                "1f1b" => Some((ScheduleKind::OneForwardOneBackward, None)),
                "gpipe" => Some((ScheduleKind::Gpipe, None)),
                "interleaved" => Some((ScheduleKind::Interleaved, None)),
                part => match part.strip_prefix("interleaved") {
                    Some(parts) => {
                        let parts = number(parts).ok_or_else(wrong)?;
                        Some((ScheduleKind::Interleaved, Some(parts)))
                    }
                    None => None,
                },
            };
            match known {
                Some(known) if schedule.is_none() && micro_batches.is_none() => {
                    schedule = Some(known);
                }
                None if micro_batches.is_none() => {
                    micro_batches = Some(number(part).ok_or_else(wrong)?);
                }
                _ => return Err(wrong()),
            }
        }
        Ok(LayoutWord::One {
            stages,
            schedule,
            micro_batches,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_read_and_what_is_none_is_refused() {
        let one = |stages, schedule, micro_batches| LayoutWord::One {
            stages,
            schedule,
            micro_batches,
        };
        let gpipe = Some((ScheduleKind::Gpipe, None));
        for (text, word) in [
            ("auto", LayoutWord::Auto),
            ("3", one(3, None, None)),
            ("2:16", one(2, None, Some(16))),
            ("2:gpipe", one(2, gpipe, None)),
            ("2:gpipe:5", one(2, gpipe, Some(5))),
            (
                "1:1f1b:1",
                one(
                    1,
                    Some((ScheduleKind::OneForwardOneBackward, None)),
                    Some(1),
                ),
            ),
            (
                "2:interleaved4:16",
                one(2, Some((ScheduleKind::Interleaved, Some(4))), Some(16)),
            ),
            (
                "2:interleaved",
                one(2, Some((ScheduleKind::Interleaved, None)), None),
            ),
        ] {
            assert_eq!(text.parse(), Ok(word), "{text}");
        }
        for text in [
            "",
            "0",
            "2:",
            "2:0",
            "two",
            "2:gpip",
            "2:8:gpipe",
            "2:8:8",
            "2:gpipe:1f1b",
            "-1",
            "2:interleavedx",
            "2:interleaved0",
            "99999",
        ] {
            let refused = text.parse::<LayoutWord>().unwrap_err();
            assert!(refused.contains("is no layout"), "{text}: {refused}");
        }
    }

    #[test]
    fn all_layouts_exist() {
        let all = LayoutChoice::all(3, 8, 6);
        let names: Vec<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "1 stage, 1f1b, 6 micro-batches",
                "2 stages, 1f1b, 6 micro-batches",
                "2 stages, gpipe, 6 micro-batches",
                "2 stages, interleaved x 2, 6 micro-batches",
                "3 stages, 1f1b, 6 micro-batches",
                "3 stages, gpipe, 6 micro-batches",
                "3 stages, interleaved x 2, 6 micro-batches",
            ]
        );
        // No more stages than blocks, nothing interleaved where it does not exist.
        assert_eq!(LayoutChoice::all(9, 2, 5).len(), 3);
        for choice in LayoutChoice::all(8, 28, 12) {
            let LayoutChoice {
                stages,
                schedule,
                virtual_stages,
                micro_batches,
            } = choice;
            crate::pipeline::schedule::Schedule::build(
                schedule,
                stages,
                virtual_stages,
                micro_batches,
            )
            .unwrap();
        }
    }
}
