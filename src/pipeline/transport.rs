//! By what activations travel between the GPUs of a run: chosen and probed before anything is loaded.

use std::time::Duration;

use super::base::StartError;
use super::needs::Exchange;
use super::schedule::Transfers;
use crate::backend::cuda::{self, CudaError, NcclLibrary, PeerCopies};
use crate::config::run::{Device, TransportKind};

/// How long a copy of a megabyte between two GPUs may take before it counts as hung.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// NCCL versions from this one on let several ranks share a GPU, where `NCCL_MULTI_RANK_GPU_ENABLE` is 1.
const MULTI_RANK_VERSION: i32 = 23_003;

/// By what.
pub(super) enum GpuTransport {
    /// NCCL.
    Nccl(&'static NcclLibrary),
    /// Copies from device to device.
    PeerCopy,
    /// Copies to the host and from there, where nothing better works.
    HostMemory,
}

impl GpuTransport {
    /// The way, for planning.
    pub fn exchange(&self) -> Exchange {
        match self {
            GpuTransport::Nccl(_) => Exchange::Nccl,
            GpuTransport::PeerCopy => Exchange::PeerCopy,
            GpuTransport::HostMemory => Exchange::HostMemory,
        }
    }

    /// The way, for the simulator.
    pub fn transfers(&self) -> Transfers {
        match self {
            GpuTransport::Nccl(_) => Transfers::Grouped,
            GpuTransport::PeerCopy => Transfers::Mailbox,
            GpuTransport::HostMemory => Transfers::Buffered,
        }
    }
}

/// What was chosen, in words for the person at the terminal.
pub(super) struct Choice {
    pub transport: GpuTransport,
    pub description: String,
}

/// Refuses a transport that cannot be had on these GPUs, before anything is read.
///
/// # Errors
/// NCCL was asked for and is missing or too old, or several stages would share a GPU.
pub(super) fn check(kind: TransportKind, ordinals: &[u32]) -> Result<(), StartError> {
    if kind != TransportKind::Nccl || ordinals.len() < 2 {
        return Ok(());
    }
    let nccl = cuda::nccl()?;
    match shared(ordinals) {
        Some(ordinal) if !shares_gpus(nccl) => Err(StartError::SharedGpu { ordinal }),
        _ => Ok(()),
    }
}

/// A GPU that is named more than once.
fn shared(ordinals: &[u32]) -> Option<u32> {
    let again = (1..ordinals.len()).find(|&rank| ordinals[..rank].contains(&ordinals[rank]));
    again.map(|rank| ordinals[rank])
}

/// Chooses for stages on these GPUs.
///
/// # Errors
/// What was asked for cannot be had, or the driver fails.
pub(super) fn choose(kind: TransportKind, devices: &[Device]) -> Result<Choice, StartError> {
    let ordinals: Vec<u32> = devices
        .iter()
        .filter_map(|device| device.ordinal())
        .collect();
    if ordinals.len() < 2 {
        return Ok(Choice {
            transport: GpuTransport::PeerCopy,
            description: String::new(),
        });
    }
    check(kind, &ordinals)?;
    let neighbours = || ordinals.iter().zip(ordinals.iter().cycle().skip(1));
    let mut pairs: Vec<(u32, u32)> = neighbours()
        .flat_map(|(&a, &b)| [(a, b), (b, a)])
        .filter(|(a, b)| a != b)
        .collect();
    pairs.sort_unstable();
    pairs.dedup();
    let way = match cuda::peer_copies(&pairs, PROBE_LIMIT) {
        PeerCopies::Direct => "GPUs reach each other directly",
        PeerCopies::ThroughHost => "through host memory where GPUs do not reach each other",
        PeerCopies::Broken(why) => {
            return Ok(Choice {
                transport: GpuTransport::HostMemory,
                description: format!("host memory, because {why}"),
            });
        }
    };
    let peer_copy = |why: &str| Choice {
        transport: GpuTransport::PeerCopy,
        description: format!("p2p{why}, {way}"),
    };
    if kind == TransportKind::P2p || kind == TransportKind::Auto && shared(&ordinals).is_some() {
        return Ok(peer_copy(""));
    }
    Ok(match (kind, cuda::nccl()) {
        (TransportKind::Nccl, Err(error)) => return Err(error.into()),
        (_, Err(CudaError::NoLibrary { .. })) => {
            peer_copy(", because NCCL was not found (pip install nvidia-nccl-cu12)")
        }
        (_, Err(error)) => peer_copy(&format!(", because {error}")),
        (_, Ok(nccl)) => Choice {
            transport: GpuTransport::Nccl(nccl),
            description: format!("NCCL {}, {way}", nccl.version_in_words()),
        },
    })
}

fn shares_gpus(nccl: &NcclLibrary) -> bool {
    let enabled = std::env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|value| value == "1");
    enabled && nccl.version() >= MULTI_RANK_VERSION
}
