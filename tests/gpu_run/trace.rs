//! What the pretend driver wrote down about a run on one GPU.

use std::ops::Range;
use std::path::Path;

use serde_json::Value;

/// The calls of a run, in order.
pub struct Trace {
    events: Vec<Value>,
    /// Where each step's norm of the gradients was queued, which every step does once, and then waits
    /// for it.
    norms: Vec<usize>,
}

impl Trace {
    pub fn read(path: &Path) -> Self {
        let text = std::fs::read_to_string(path).unwrap();
        let events: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        let norms = events.iter().enumerate();
        let norms = norms.filter(|(_, event)| event["kernel"] == "square_sums");
        Trace {
            norms: norms.map(|(place, _)| place).collect(),
            events,
        }
    }

    pub fn steps(&self) -> usize {
        self.norms.len()
    }

    /// Bytes of every allocation on the device, in order.
    pub fn allocations(&self) -> Vec<u64> {
        let all = self.events.iter();
        let all = all.filter(|event| event["event"] == "allocate");
        all.map(|event| event["bytes"].as_u64().unwrap()).collect()
    }

    fn count(&self, name: &str, range: Range<usize>) -> usize {
        let events = self.events[range].iter();
        events.filter(|event| event["event"] == name).count()
    }

    /// Launches between the norm of a step, counted from 1, and that of the next, of the kernels whose
    /// names are `wanted`.
    pub fn launches(&self, step: usize, wanted: impl Fn(&str) -> bool) -> usize {
        let events = self.events[self.norms[step - 1]..self.norms[step]].iter();
        let kernels = events.filter_map(|event| event["kernel"].as_str());
        kernels.filter(|kernel| wanted(kernel)).count()
    }

    /// Between the norm of the first step and that of the last nothing is allocated, freed, loaded or
    /// chosen; all kernels are there before the first launch; and the host waits once in each step,
    /// but for those that follow on a checkpoint of step `saved`, if any: writing that reads.
    #[track_caller]
    pub fn assert_steady(&self, saved: Option<usize>) {
        let (first, last) = (self.norms[0], *self.norms.last().unwrap());
        for event in ["allocate", "free", "load_module", "algorithms"] {
            assert_eq!(
                self.count(event, first..last),
                0,
                "{event} after the first step"
            );
        }
        let is_launch = |event: &Value| event["event"] == "launch";
        let launch = self.events.iter().position(is_launch).unwrap();
        for event in ["load_module", "algorithms"] {
            assert!(self.count(event, 0..launch) > 0, "no {event}");
            let late = self.count(event, launch..first);
            assert_eq!(late, 0, "{event} in the first step");
        }
        for (step, ends) in self.norms.windows(2).enumerate() {
            // Every wait is for a read, and none is a call that could wait for ever.
            let waits = self.count("copy_to_host", ends[0]..ends[1]);
            assert_eq!(self.count("synchronise", ends[0]..ends[1]), 0);
            match saved == Some(step + 1) {
                true => assert!(waits > 1, "step {saved:?} is saved without a read"),
                false => assert_eq!(waits, 1, "waits in step {}", step + 2),
            }
        }
    }
}
