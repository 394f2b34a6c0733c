//! `mp-train bench`: how fast a model of a named size trains here, with made-up weights and rows, in one
//! layout or several. Each layout is an engine of its own, started, warmed up, counted, profiled and
//! ended before the next begins.

pub mod flops;
mod layout;
pub mod machine;
pub mod matmul;
pub mod options;
pub mod profile;
pub mod result;
pub mod rows;
pub mod timeline;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub use self::layout::Picture;
pub use self::machine::MeasuredAs;
pub use self::options::{BenchOptions, LayoutChoice, LayoutWord, schedule_name};
pub use self::result::{BenchResult, LayoutFailure, LayoutResult, Measurement};
pub use self::rows::{Lengths, SHORTEST};

use self::layout::Bench;
use self::machine::{Machine, MemoryBefore, Smi};
use self::matmul::MatmulRate;
use crate::backend::cuda::{self, CudaError};
use crate::backend::{BackendError, any_left_behind};
use crate::checkpoint::synthetic::SyntheticTensors;
use crate::config::model::ModelConfig;
pub use crate::config::model_size::ModelSize;
use crate::config::run::{Device, Quantization};
use crate::model::trainables::Trainables;
use crate::model::weights;
use crate::pipeline::base::{Base, StartError, check_devices};
use crate::pipeline::failure::Failure;
use crate::report::FailureClass;

const SEED: u64 = 42;

/// Why nothing could be measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The stages could not be started.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A stage failed.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// The product whose rate is measured could not be computed.
    #[error("while the rate of matrix products was measured: {0}")]
    Product(#[from] BackendError),
    /// Loss or gradient were not finite.
    #[error("step {step}: loss or gradient is not finite; what was measured would mean nothing")]
    NotFinite {
        /// From 1.
        step: usize,
    },
    /// Rows that the model does not take.
    #[error(
        "a row of {found} tokens: rows of the bench have {SHORTEST} tokens, to have a context and a \
         target, to the {longest} that the model takes"
    )]
    Length {
        /// As asked for.
        found: usize,
        /// Of the model.
        longest: usize,
    },
    /// A layout of more stages than devices.
    #[error(
        "--layouts asks for {stages} stages, and --devices names {devices}: name a device for each \
         stage (one may be named several times)"
    )]
    Devices {
        /// As asked for.
        stages: usize,
        /// There are.
        devices: usize,
    },
    /// A layout that was not tried.
    #[error("not tried: a stage of an earlier layout hangs in its device and holds its memory")]
    NotTried,
}

impl BenchError {
    /// Whether there is no GPU to measure.
    pub fn is_without_gpu(&self) -> bool {
        matches!(
            self,
            BenchError::Start(StartError::Cuda(CudaError::NoDriver | CudaError::NoDevice))
        )
    }

    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        let machine = match self {
            // Nothing is broken: a GPU was asked for where there is none.
            _ if self.is_without_gpu() => false,
            BenchError::Start(error) => error.is_machine(),
            BenchError::Failure(failure) => failure.is_machine(),
            BenchError::Product(error) => error.is_machine(),
            BenchError::NotFinite { .. } | BenchError::NotTried => true,
            BenchError::Length { .. } | BenchError::Devices { .. } => false,
        };
        match machine {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}

/// What the person at the terminal sees while it goes on.
pub trait Watcher {
    /// A layout is about to be measured: the `index`-th of `count`, from 0.
    fn begins(&mut self, index: usize, count: usize, layout: &LayoutChoice);
    /// A step of a layout was profiled; the `index`-th layout of `count`.
    fn profiled(&mut self, index: usize, count: usize, picture: Picture);
}

/// Measures every layout of `options`. A layout that cannot be measured is told in the result, and the
/// others are measured.
///
/// # Errors
/// What is asked for makes no sense, or a device cannot be used at all.
pub fn run(
    options: &BenchOptions,
    commit: Option<String>,
    watcher: &mut dyn Watcher,
) -> Result<BenchResult, BenchError> {
    let config = options.size.config();
    check(options, &config)?;
    // Before a GPU is opened: what is in use then is what others use.
    let smi = Smi::ask();
    check_devices(&options.devices, options.precision, options.transport)?;
    let uses_gpus = options.devices.iter().any(|&device| device != Device::Cpu);
    let survey = match uses_gpus {
        true => Some(cuda::survey().map_err(StartError::Cuda)?),
        false => None,
    };
    let machine = Machine::here(survey.as_ref(), &options.devices, &smi);
    let gpus = survey.map_or(Vec::new(), |survey| survey.gpus);
    let matmul = matmul_rates(options, &machine, &gpus)?;

    let base = synthetic_base(config, options.quantization)?;
    let tied = base.head_source.tied;
    let trainables =
        Trainables::new(&base.config, &options.adapter, tied).map_err(StartError::Model)?;
    let bench = Bench {
        options,
        base: &base,
        trainables: &trainables,
        matmul: &matmul,
        capabilities: gpus
            .iter()
            .map(|gpu| (gpu.ordinal, gpu.capability))
            .collect(),
        before: MemoryBefore::new(smi, gpus),
    };
    let mut layouts = Vec::with_capacity(options.layouts.len());
    let count = options.layouts.len();
    for (index, &layout) in options.layouts.iter().enumerate() {
        watcher.begins(index, count, &layout);
        let mut show = |picture| watcher.profiled(index, count, picture);
        let measured = match any_left_behind() {
            true => Err(BenchError::NotTried),
            false => bench.measure(layout, &mut show),
        };
        let (measured, failure) = match measured {
            Ok(measured) => (Some(measured), None),
            // A person who asked for one layout gets its error as that of the command.
            Err(error) if count == 1 => return Err(error),
            Err(error) => {
                let (reason, class) = (error.to_string(), error.class());
                (None, Some(LayoutFailure { reason, class }))
            }
        };
        layouts.push(LayoutResult {
            devices: options.devices[..layout.stages].to_vec(),
            layout,
            measured,
            failure,
        });
    }
    Ok(BenchResult {
        format: result::FORMAT,
        version: env!("CARGO_PKG_VERSION"),
        commit,
        date: now(),
        machine,
        options: options.clone(),
        matmul,
        layouts,
    })
}

fn check(options: &BenchOptions, config: &ModelConfig) -> Result<(), BenchError> {
    let longest = config.max_sequence_length;
    let (shortest_row, longest_row) = options.lengths.range();
    for found in [shortest_row, longest_row] {
        if !(SHORTEST..=longest).contains(&found) {
            return Err(BenchError::Length { found, longest });
        }
    }
    let devices = options.devices.len();
    let mut layouts = options.layouts.iter();
    match layouts.find(|layout| layout.stages > devices) {
        None => Ok(()),
        Some(&LayoutChoice { stages, .. }) => Err(BenchError::Devices { stages, devices }),
    }
}

/// One for each distinct device.
fn matmul_rates(
    options: &BenchOptions,
    machine: &Machine,
    gpus: &[cuda::GpuInfo],
) -> Result<Vec<MatmulRate>, BenchError> {
    let mut rates: Vec<MatmulRate> = Vec::new();
    for &device in &options.devices {
        if rates.iter().any(|rate| rate.device == device) {
            continue;
        }
        let gpu = gpus
            .iter()
            .find(|gpu| Some(gpu.ordinal) == device.ordinal());
        rates.push(match gpu {
            Some(gpu) => MatmulRate::of_gpu(gpu, options.product_sums)?,
            None => {
                let name = machine.cpu.clone().unwrap_or_else(|| "cpu".to_owned());
                MatmulRate::of_cpu(options.threads, name)?
            }
        });
    }
    Ok(rates)
}

/// A model without files.
fn synthetic_base(mut config: ModelConfig, quantization: Quantization) -> Result<Base, StartError> {
    let tensors = weights::own_tensors(&config, config.tie_word_embeddings);
    let source = SyntheticTensors::new(tensors, SEED);
    let head_source = weights::check(&source, &config)?;
    config.quantization = quantization;
    Ok(Base {
        config,
        source: Arc::new(source),
        head_source,
    })
}

/// The time in UTC: `2026-01-31T12:00:00Z`.
fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    date(since.map_or(0, |since| since.as_secs()))
}

/// `seconds` after the beginning of 1970, by Howard Hinnant's `civil_from_days` ("chrono-Compatible
/// Low-Level Date Algorithms"): years that begin in March have their leap day at the end.
fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // From March 1 of the year 0.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3_600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::date;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // By GNU date -u -d @SECONDS +%FT%TZ.
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
            (4_107_542_399, "2100-02-28T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }
}
