//! `mp-train devices`: the GPUs of this machine and what this build can do with them.

use std::fmt::Write as _;
use std::io::Write as _;

use super::failure::{Failure, FailureClass};
use super::print;
use crate::backend::cuda::{self, CudaError, GpuInfo, Survey};
use crate::config::run::{Device, Precision};

/// The GPUs to use where nothing was said: all that can be used; nothing where there is none, or
/// where the precision asked for is not theirs. GPUs that cannot be used for want of a library are
/// worth a warning.
pub(super) fn visible_gpus(precision: Option<Precision>) -> Option<Vec<Device>> {
    if precision == Some(Precision::F32) {
        return None;
    }
    match cuda::visible() {
        Ok(ordinals) if ordinals.is_empty() => None,
        Ok(ordinals) => Some(ordinals.into_iter().map(Device::Cuda).collect()),
        Err(error) => {
            // Nobody is left to warn when standard error is closed.
            let _ = writeln!(
                std::io::stderr(),
                "warning: the GPUs are not used, the CPU computes: {error}"
            );
            None
        }
    }
}

pub(super) fn run() -> Result<(), Failure> {
    match cuda::survey() {
        Ok(survey) => print(&describe(&survey)),
        // A machine without a GPU is not broken; what is missing is still worth telling.
        Err(error @ (CudaError::NoDriver | CudaError::NoDevice)) => {
            print(&format!("cpu\n{error}\n"))
        }
        Err(error) => Err(Failure::new(FailureClass::Machine, &error)),
    }
}

/// Says, line by line, what becomes of a copy for each pair of GPUs.
pub(super) fn probe(pairs: &[String]) -> Result<(), Failure> {
    for pair in pairs {
        let numbers = pair.split_once('-');
        let numbers = numbers.and_then(|(from, to)| Some((from.parse().ok()?, to.parse().ok()?)));
        let line = match numbers {
            Some((from, to)) => cuda::probe(from, to),
            None => format!("failed: `{pair}` is not a pair such as 0-1"),
        };
        print(&format!("{line}\n"))?;
    }
    Ok(())
}

fn describe(survey: &Survey) -> String {
    let Survey {
        driver,
        nvrtc,
        cublaslt,
        gpus,
    } = survey;
    let mut text = String::from("cpu\n");
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "CUDA driver {}.{}, NVRTC {}.{}, cuBLASLt {}.{}.{}",
        driver.0, driver.1, nvrtc.0, nvrtc.1, cublaslt.0, cublaslt.1, cublaslt.2
    );
    for gpu in gpus {
        text.push_str(&describe_gpu(gpu, gpus.len()));
    }
    text
}

fn describe_gpu(gpu: &GpuInfo, count: usize) -> String {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let (major, minor) = (gpu.capability / 10, gpu.capability % 10);
    let kernels = match &gpu.kernels {
        Some(target) => format!("kernels for {target}"),
        None => "too old, 7.5 is needed".to_owned(),
    };
    let list: Vec<String> = gpu.peers.iter().map(ToString::to_string).collect();
    let peers = match (count, list.is_empty()) {
        (0 | 1, _) => String::new(),
        (_, true) => ", no peer access".to_owned(),
        (_, false) => format!(", peer access to {}", list.join(", ")),
    };
    format!(
        "{}: {}, compute capability {major}.{minor}, {:.1} of {:.1} GiB free, {kernels}{peers}\n",
        gpu.ordinal,
        gpu.name,
        gib(gpu.free_memory),
        gib(gpu.total_memory),
    )
}
