//! The machine that is measured on: processor, GPUs, driver; and how much of its memory is in use.

use std::fs;
use std::process::Command;

use serde::Serialize;

use crate::backend::cuda::{self, CudaError, GpuInfo};
use crate::config::run::Device;

/// What is measured on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// The processor as it calls itself; nothing where that is not known.
    pub cpu: Option<String>,
    /// Hardware threads that this process may use.
    pub cores: usize,
    /// The GPUs that are measured on.
    pub gpus: Vec<Gpu>,
    /// Version of the GPU driver; nothing without GPUs, or where `nvidia-smi` is not there.
    pub driver: Option<String>,
    /// CUDA version of that driver, NVRTC's and cuBLASLt's.
    pub cuda: Option<CudaVersions>,
}

/// One GPU.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Gpu {
    /// CUDA's number.
    pub ordinal: u32,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability times ten.
    pub capability: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// Versions as `12.8`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CudaVersions {
    /// That the driver supports.
    pub driver: String,
    /// Of the compiler of our kernels.
    pub nvrtc: String,
    /// Of the library of matrix products.
    pub cublaslt: String,
}

impl Machine {
    /// This machine; `survey` where GPUs are used.
    pub fn here(survey: Option<&cuda::Survey>, devices: &[Device], smi: &Smi) -> Self {
        let used = |gpu: &&GpuInfo| devices.contains(&Device::Cuda(gpu.ordinal));
        let gpus = survey.map_or(&[][..], |survey| &survey.gpus);
        let gpu = |gpu: &GpuInfo| Gpu {
            ordinal: gpu.ordinal,
            name: gpu.name.clone(),
            capability: gpu.capability,
            memory_bytes: gpu.total_memory,
        };
        Machine {
            cpu: processor(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            gpus: gpus.iter().filter(used).map(gpu).collect(),
            driver: smi.rows.first().map(|row| row.driver.clone()),
            cuda: survey.map(|survey| CudaVersions {
                driver: format!("{}.{}", survey.driver.0, survey.driver.1),
                nvrtc: format!("{}.{}", survey.nvrtc.0, survey.nvrtc.1),
                cublaslt: {
                    let (major, minor, patch) = survey.cublaslt;
                    format!("{major}.{minor}.{patch}")
                },
            }),
        }
    }
}

fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    let (_, name) = line.split_once(':')?;
    Some(name.trim().to_owned())
}

/// What `nvidia-smi` says about the GPUs, in its order. It opens none of them, so that what it says to
/// be in use before a run is without the context of this process, which CUDA's own question has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Smi {
    rows: Vec<SmiRow>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct SmiRow {
    name: String,
    used_mib: u64,
    driver: String,
}

impl Smi {
    /// Asks now; nothing where the program is not there or fails.
    pub fn ask() -> Self {
        let output = Command::new("nvidia-smi")
            .arg("--query-gpu=name,memory.used,driver_version")
            .arg("--format=csv,noheader,nounits")
            .output();
        match output {
            Ok(output) if output.status.success() => {
                Smi::parse(&String::from_utf8_lossy(&output.stdout))
            }
            _ => Smi::default(),
        }
    }

    fn parse(text: &str) -> Self {
        let row = |line: &str| {
            let mut fields = line.split(',').map(str::trim);
            Some(SmiRow {
                name: fields.next()?.to_owned(),
                used_mib: fields.next()?.parse().ok()?,
                driver: fields.next()?.to_owned(),
            })
        };
        // A line that is not understood makes the order of the others doubtful.
        let rows: Option<Vec<SmiRow>> = text.lines().map(row).collect();
        Smi {
            rows: rows.unwrap_or_default(),
        }
    }

    /// Bytes in use of each of CUDA's GPUs; nothing where it is not certain which is which. CUDA counts
    /// the fastest first and leaves out what `CUDA_VISIBLE_DEVICES` does: GPUs alike, all of them
    /// visible, have the same order in both.
    fn used(&self, gpus: &[GpuInfo]) -> Option<Vec<u64>> {
        let first = gpus.first()?;
        let is_alike = self.rows.iter().all(|row| row.name == first.name)
            && gpus.iter().all(|gpu| gpu.name == first.name);
        let is_clear = self.rows.len() == gpus.len()
            && is_alike
            && (gpus.len() == 1 || std::env::var_os("CUDA_VISIBLE_DEVICES").is_none());
        is_clear.then(|| self.rows.iter().map(|row| row.used_mib << 20).collect())
    }
}

/// How a device's memory was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MeasuredAs {
    /// By how much the GPU's used memory rose from before this process first opened it to the end of
    /// the last step, as `nvidia-smi` shows it, in MiB: context and libraries included.
    GpuRiseByNvidiaSmi,
    /// By how much it rose as the driver tells it to this process: libraries included, the bare context
    /// not. Other processes on the GPU count too.
    GpuRiseByCuda,
    /// By how much the process's resident memory rose, at its peak, from before the stages started, all
    /// of them together.
    ResidentRise,
}

/// Memory in use before anything was started.
#[derive(Clone, Debug)]
pub struct MemoryBefore {
    smi: Smi,
    gpus: Vec<GpuInfo>,
}

impl MemoryBefore {
    /// `smi` was asked before the GPUs were opened, `gpus` are those found then.
    pub fn new(smi: Smi, gpus: Vec<GpuInfo>) -> Self {
        MemoryBefore { smi, gpus }
    }

    /// Bytes by which the used memory of each GPU is larger now, and how that was seen.
    ///
    /// # Errors
    /// A GPU cannot be asked.
    pub fn rise(&self) -> Result<(Vec<(u32, u64)>, MeasuredAs), CudaError> {
        if self.gpus.is_empty() {
            return Ok((Vec::new(), MeasuredAs::GpuRiseByCuda));
        }
        let ordinals = self.gpus.iter().map(|gpu| gpu.ordinal);
        let by_smi = self.smi.used(&self.gpus).zip(Smi::ask().used(&self.gpus));
        if let Some((before, now)) = by_smi {
            let rise = now
                .iter()
                .zip(&before)
                .map(|(now, was)| now.saturating_sub(*was));
            return Ok((ordinals.zip(rise).collect(), MeasuredAs::GpuRiseByNvidiaSmi));
        }
        let mut rises = Vec::with_capacity(self.gpus.len());
        for gpu in &self.gpus {
            let (free, _) = cuda::free_memory(gpu.ordinal)?;
            rises.push((gpu.ordinal, gpu.free_memory.saturating_sub(free)));
        }
        Ok((rises, MeasuredAs::GpuRiseByCuda))
    }
}

/// The resident memory of this process, as Linux counts it.
#[derive(Clone, Copy, Debug)]
pub struct ResidentMemory {
    start: u64,
}

impl ResidentMemory {
    /// Starts to look for the peak: what was before no longer counts. Nothing where the system does not
    /// tell or cannot forget an older peak.
    pub fn watch() -> Option<Self> {
        // 5: the peak is what is resident now (man 5 proc, /proc/pid/clear_refs).
        fs::write("/proc/self/clear_refs", "5").ok()?;
        let start = status_bytes("VmRSS:")?;
        Some(ResidentMemory { start })
    }

    /// Bytes by which the peak is above the start.
    pub fn peak_rise(self) -> Option<u64> {
        Some(status_bytes("VmHWM:")?.saturating_sub(self.start))
    }
}

fn status_bytes(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|line| line.starts_with(field))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn gpu(ordinal: u32, name: &str) -> GpuInfo {
        GpuInfo {
            ordinal,
            name: name.to_owned(),
            capability: 90,
            total_memory: 80 << 30,
            free_memory: 79 << 30,
            peers: Vec::new(),
            kernels: None,
        }
    }

    #[test]
    fn what_nvidia_smi_says_is_taken_where_it_is_clear_who_is_who() {
        let two = Smi::parse("NVIDIA H100 80GB HBM3, 4, 570.1\nNVIDIA H100 80GB HBM3, 17, 570.1\n");
        let name = "NVIDIA H100 80GB HBM3";
        assert_eq!(two.rows[1].used_mib, 17);
        assert_eq!(two.used(&[gpu(0, name)]), None);
        assert_eq!(two.used(&[gpu(0, name), gpu(1, "NVIDIA L4")]), None);
        assert_eq!(two.used(&[]), None);
        let one = Smi::parse("NVIDIA L4, 3, 570.1\n");
        assert_eq!(one.used(&[gpu(0, "NVIDIA L4")]), Some(vec![3 << 20]));
        assert_eq!(one.used(&[gpu(0, "Pretend GPU")]), None);
        let mixed = Smi::parse("NVIDIA L4, 3, 570.1\nNVIDIA T4, 3, 570.1\n");
        assert_eq!(
            mixed.used(&[gpu(0, "NVIDIA T4"), gpu(1, "NVIDIA L4")]),
            None
        );
        // MIG devices have no number there.
        assert_eq!(Smi::parse("NVIDIA L4, [N/A], 570.1\n"), Smi::default());
    }

    #[test]
    fn a_peak_that_is_gone_is_seen() {
        let Some(before) = ResidentMemory::watch() else {
            println!("skipped: /proc/self/clear_refs cannot be written");
            return;
        };
        let room = vec![1_u8; 384 << 20];
        drop(std::hint::black_box(room));
        // Much more than what other tests of this process give back meanwhile.
        assert!(before.peak_rise().unwrap() >= 128 << 20);
    }
}
