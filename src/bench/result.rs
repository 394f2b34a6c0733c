//! What was measured: the document that `mp-train bench --json` writes, whose schema is
//! `tests/bench/schema.json`.

use serde::Serialize;

use super::flops::Flops;
use super::machine::{Machine, MeasuredAs};
use super::matmul::MatmulRate;
use super::options::{BenchOptions, LayoutChoice};
use super::profile::Profiled;
use super::rows::RowCounts;
use crate::config::run::{Device, Recompute};
use crate::report::FailureClass;

/// Changes when a field changes its name or its meaning, or goes.
pub const FORMAT: u32 = 1;

/// A run of the bench.
#[derive(Clone, Debug, Serialize)]
pub struct BenchResult {
    /// [`FORMAT`].
    pub format: u32,
    /// Version of mp-train.
    pub version: &'static str,
    /// Commit of mp-train, as the caller says; nothing where nobody did.
    pub commit: Option<String>,
    /// When it ended, in UTC: `2026-01-31T12:00:00Z`.
    pub date: String,
    /// Where.
    pub machine: Machine,
    /// What was asked for.
    pub options: BenchOptions,
    /// How fast each device multiplies matrices, measured before the layouts.
    pub matmul: Vec<MatmulRate>,
    /// In the order of the options.
    pub layouts: Vec<LayoutResult>,
}

/// What became of a layout.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutResult {
    /// Which.
    pub layout: LayoutChoice,
    /// Where its stages run.
    pub devices: Vec<Device>,
    /// What was measured; nothing where it could not be.
    pub measured: Option<Measurement>,
    /// Why not.
    pub failure: Option<LayoutFailure>,
}

/// A layout that could not be measured.
#[derive(Clone, Debug, Serialize)]
pub struct LayoutFailure {
    /// In words.
    pub reason: String,
    /// Whose turn it is.
    #[serde(skip)]
    pub class: FailureClass,
}

/// The numbers of a layout. A step is all its micro-batches forward and backward, and the update.
#[derive(Clone, Debug, Serialize)]
pub struct Measurement {
    /// Rows, tokens and targets of a step, the same in every step.
    pub rows: RowCounts,
    /// Seconds of the counted steps.
    pub step_seconds: Seconds,
    /// Tokens of a step over the median step's seconds.
    pub tokens_per_second: f64,
    /// Rows of a step over the median step's seconds.
    pub samples_per_second: f64,
    /// Operations of the matrix products that a step needs.
    pub needed_flops: Flops,
    /// These over the median step's seconds, in 10^12 per second.
    pub model_tflops: f64,
    /// Shares of what the devices could do.
    pub mfu: Mfu,
    /// Share of idle time that the schedule's formula gives, `(p - 1) / (v m + p - 1)`.
    pub bubble_by_formula: f64,
    /// Measured steps after the counted ones; nothing where none was asked for.
    pub profile: Option<Profiled>,
    /// The stages.
    pub stages: Vec<StageResult>,
    /// Memory of each device.
    pub memory: Vec<DeviceMemoryResult>,
    /// How activations travel between GPUs; empty where they do not.
    pub transport: String,
    /// Seconds to start: weights made and loaded, kernels compiled or loaded.
    pub start_seconds: f64,
    /// Loss of the last counted step: a number, if all went well.
    pub last_loss: f32,
}

/// Seconds of several steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Seconds {
    /// Each, in their order.
    pub all: Vec<f64>,
    /// The middle one, or the mean of the two in the middle.
    pub median: f64,
    /// The shortest.
    pub min: f64,
    /// The longest.
    pub max: f64,
    /// `(max - min) / median`.
    pub spread: f64,
}

impl Seconds {
    /// Of these steps, one at least.
    pub fn of(all: Vec<f64>) -> Self {
        let mut sorted = all.clone();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted.len().saturating_sub(1) / 2, sorted.len() / 2);
        let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
        let median = f64::midpoint(at(low), at(high));
        let (min, max) = (at(0), at(sorted.len().saturating_sub(1)));
        Seconds {
            all,
            median,
            min,
            max,
            spread: (max - min) / median,
        }
    }
}

/// Model FLOP/s utilisation: operations needed per second, over those that all devices of the layout
/// together could do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Mfu {
    /// By their matrix products measured in the same run ([`MatmulRate::tflops`]), added up over
    /// distinct devices.
    pub of_measured_matmul: f64,
    /// By their data sheets, where all of them are known.
    pub of_data_sheet: Option<f64>,
}

/// One stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StageResult {
    /// Where it runs.
    pub device: Device,
    /// Blocks that it holds.
    pub blocks: usize,
    /// What it recomputed.
    pub recompute: Recompute,
    /// Bytes of weights, trainables, activations and workspace.
    pub planned_bytes: u64,
}

/// Memory of a device, with all stages on it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DeviceMemoryResult {
    /// The device.
    pub device: Device,
    /// Bytes that its stages planned and, on a GPU, took at once.
    pub planned_bytes: u64,
    /// Bytes more in use than before, at the peak; nothing where the system does not tell.
    pub peak_bytes: Option<u64>,
    /// How the peak was seen.
    pub measured_as: MeasuredAs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_summed_up_by_their_median_and_their_spread() {
        let five = Seconds::of(vec![3.0, 1.0, 2.0, 5.0, 4.0]);
        assert_eq!((five.median, five.min, five.max), (3.0, 1.0, 5.0));
        assert_eq!(five.all, [3.0, 1.0, 2.0, 5.0, 4.0]);
        assert!((five.spread - 4.0 / 3.0).abs() < 1e-12);
        let two = Seconds::of(vec![3.0, 1.0]);
        assert_eq!(two.median, 2.0);
        assert_eq!(Seconds::of(vec![7.0]).spread, 0.0);
    }
}
