//! How fast a device multiplies matrices, measured here and by its data sheet: the denominators of MFU.

use std::time::Instant;

use serde::Serialize;

use super::{BenchError, SEED};
use crate::backend::cpu::Cpu;
use crate::backend::cuda::{Cuda, GpuInfo};
use crate::backend::{Backend, BackendError, Element, LinearShape, Sums};
use crate::config::run::{Device, Precision, ProductSums};
use crate::model::load::sums;
use crate::random::{Domain, Key};

/// Rows and columns of the smallest product that is tried; the next have twice as many.
const SMALLEST: usize = 256;
/// Of the largest: more brings nothing.
const LARGEST: usize = 8_192;
/// Larger products are not tried where one takes as long as this.
const LONG: f64 = 0.05;
/// Times that each product is timed.
const RUNS: usize = 5;
/// A timing has as many products as fill this, so that the wait for the device does not count.
const TIMED_SECONDS: f64 = 0.02;
/// At most.
const MOST_REPEATS: f64 = 100.0;
/// Distinct values of the operands, a prime: no two rows are alike.
const DISTINCT: usize = 65_521;

/// The best rate at which a device multiplies matrices.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatmulRate {
    /// As in `--devices`. `cpu` is all its threads together.
    pub device: Device,
    /// Its name: of the GPU, or of the processor.
    pub name: String,
    /// Element type of the operands.
    pub precision: Precision,
    /// What they are summed in: as the frozen layers' products of the run.
    pub product_sums: ProductSums,
    /// Rows, inner dimension and columns of the product that went fastest.
    pub shape: [usize; 3],
    /// 10^12 operations per second, the best of all runs.
    pub tflops: f64,
    /// What the data sheet promises where the card is known: dense tensor products of f16 with these
    /// sums.
    pub data_sheet_tflops: Option<f64>,
}

impl MatmulRate {
    /// Of all CPU threads, in f32.
    ///
    /// # Errors
    /// Threads or memory cannot be had.
    pub fn of_cpu(threads: usize, name: String) -> Result<Self, BenchError> {
        let backend = Cpu::<f32>::new(threads)?;
        let (size, tflops) = best(&backend, Sums::F32)?;
        Ok(MatmulRate {
            device: Device::Cpu,
            name,
            precision: Precision::F32,
            product_sums: ProductSums::F32,
            shape: [size; 3],
            tflops,
            data_sheet_tflops: None,
        })
    }

    /// Of a GPU, in f16.
    ///
    /// # Errors
    /// The GPU fails.
    pub fn of_gpu(gpu: &GpuInfo, product_sums: ProductSums) -> Result<Self, BenchError> {
        // On a thread of its own, which the GPU's context leaves with it.
        let measured = std::thread::scope(|scope| {
            let thread = scope.spawn(|| best(&Cuda::new(gpu.ordinal)?, sums(product_sums)));
            thread.join()
        });
        let (size, tflops) = match measured {
            Ok(measured) => measured?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        Ok(MatmulRate {
            device: Device::Cuda(gpu.ordinal),
            name: gpu.name.clone(),
            precision: Precision::F16,
            product_sums,
            shape: [size; 3],
            tflops,
            data_sheet_tflops: data_sheet(&gpu.name, product_sums),
        })
    }
}

/// The size of square product that goes fastest, and 10^12 operations per second of its fastest run.
fn best<B: Backend>(backend: &B, sums: Sums) -> Result<(usize, f64), BackendError> {
    let (mut best_size, mut best_rate) = (SMALLEST, 0.0);
    let mut size = SMALLEST;
    loop {
        let seconds = product_seconds(backend, size, sums)?;
        let rate = 2.0 * (size as f64).powi(3) / seconds / 1e12;
        if rate > best_rate {
            (best_size, best_rate) = (size, rate);
        }
        if seconds >= LONG || size >= LARGEST {
            return Ok((best_size, best_rate));
        }
        size *= 2;
    }
}

/// Seconds of one product of `size` in each dimension, in the fastest run.
fn product_seconds<B: Backend>(backend: &B, size: usize, sums: Sums) -> Result<f64, BackendError> {
    let (x, weight) = (
        normal_values::<B>(backend, size * size, 0)?,
        normal_values::<B>(backend, size * size, 1)?,
    );
    let mut out = backend.zeros::<B::Element>(size * size)?;
    let shape = LinearShape {
        rows: size,
        in_features: size,
        out_features: size,
        sums,
    };
    let mut timed = |repeats: usize| -> Result<f64, BackendError> {
        let began = Instant::now();
        for _ in 0..repeats {
            backend.linear(&mut out, &x, &weight, None, shape, 1.0, false)?;
        }
        // Waits for all of them.
        backend.read(&out, 1)?;
        Ok(began.elapsed().as_secs_f64() / repeats as f64)
    };
    // The first run loads the kernel, the second says how long one takes.
    timed(1)?;
    let repeats = (TIMED_SECONDS / timed(1)?).clamp(1.0, MOST_REPEATS) as usize;
    let mut fastest = f64::INFINITY;
    for _ in 0..RUNS {
        fastest = fastest.min(timed(repeats)?);
    }
    Ok(fastest)
}

/// Normal values, since zeros take a GPU less power, and so less time, than a model's.
fn normal_values<B: Backend>(
    backend: &B,
    len: usize,
    operand: u64,
) -> Result<B::Buffer<B::Element>, BackendError> {
    let mut stream = Key::new(SEED, Domain::ModelInit).fold(operand).stream();
    let values: Vec<B::Element> = (0..DISTINCT.min(len))
        .map(|_| B::Element::from_f32(stream.normal()))
        .collect();
    backend.upload_pieces(len, 1, |start, piece| {
        for (offset, value) in piece.iter_mut().enumerate() {
            *value = values[(start + offset) % values.len()];
        }
        Ok(())
    })
}

/// Dense f16 tensor products with f32 sums, in 10^12 operations per second, without sparsity, by the
/// driver's name of the card. From NVIDIA's own tables: the white papers of Turing, Ampere (GA102), Ada
/// and Blackwell (RTX) for GeForce and RTX cards, data sheets for the others, of which half is taken
/// where they state the rate with sparsity alone.
const DATA_SHEETS: &[(&str, f64)] = &[
    ("Tesla T4", 65.0),
    ("NVIDIA GeForce RTX 3080", 59.5),
    ("NVIDIA GeForce RTX 3090", 71.0),
    ("NVIDIA GeForce RTX 3090 Ti", 80.0),
    ("NVIDIA GeForce RTX 4080", 97.5),
    ("NVIDIA GeForce RTX 4090", 165.2),
    ("NVIDIA GeForce RTX 5090", 209.5),
    ("NVIDIA RTX A6000", 154.8),
    ("NVIDIA A10", 125.0),
    ("NVIDIA A30", 165.0),
    ("NVIDIA A40", 149.7),
    ("NVIDIA A100-SXM4-40GB", 312.0),
    ("NVIDIA A100-SXM4-80GB", 312.0),
    ("NVIDIA A100-PCIE-40GB", 312.0),
    ("NVIDIA A100 80GB PCIe", 312.0),
    ("NVIDIA L4", 121.0),
    ("NVIDIA L40S", 362.0),
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 80GB HBM3", 989.0),
    ("NVIDIA H200", 989.0),
];

/// GeForce cards take halves with f16 sums at twice the rate, by the same white papers; others gain nothing.
fn data_sheet(name: &str, product_sums: ProductSums) -> Option<f64> {
    let twice = product_sums == ProductSums::F16 && name.contains("GeForce");
    let mut sheets = DATA_SHEETS.iter();
    // A part of a GPU (MIG) has a longer name, and another rate.
    sheets
        .find(|(known, _)| *known == name)
        .map(|(_, tflops)| if twice { 2.0 * tflops } else { *tflops })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use half::f16;

    use super::*;

    #[test]
    fn operands_are_filled_to_the_end_with_values_that_differ() {
        let backend = Cpu::<f16>::new(1).unwrap();
        // More than a piece and more than the distinct values.
        let len = (1 << 20) + 65;
        let buffer = normal_values(&backend, len, 0).unwrap();
        let values = backend.read(&buffer, len).unwrap();
        let squares: f64 = values.iter().map(|v| f64::from(v.to_f32()).powi(2)).sum();
        assert!((squares / len as f64 - 1.0).abs() < 0.02);
        assert_eq!(values[3], values[3 + DISTINCT]);
        let other = normal_values(&backend, 97, 1).unwrap();
        assert_ne!(backend.read(&other, 97).unwrap(), values[..97]);
    }

    #[test]
    fn a_rate_is_that_of_a_product_that_was_timed() {
        let backend = Cpu::<f32>::new(1).unwrap();
        let (size, rate) = best(&backend, Sums::F32).unwrap();
        assert!(size.is_power_of_two() && (SMALLEST..=LARGEST).contains(&size));
        // No processor of today makes less with one thread, or more.
        assert!((1e-5..10.0).contains(&rate), "{rate}");
    }

    #[test]
    fn cards_are_known_by_their_whole_name() {
        let single = |name| data_sheet(name, ProductSums::F32);
        let half = |name| data_sheet(name, ProductSums::F16);
        assert_eq!(single("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(half("NVIDIA H100 80GB HBM3"), Some(989.0));
        assert_eq!(single("NVIDIA H100 80GB HBM3 MIG 1g.10gb"), None);
        assert_eq!(single("NVIDIA GeForce RTX 3090 Ti"), Some(80.0));
        assert_eq!(half("NVIDIA GeForce RTX 3090 Ti"), Some(160.0));
        assert_eq!(single("Pretend GPU"), None);
    }
}
