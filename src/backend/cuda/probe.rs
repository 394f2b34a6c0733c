//! Whether copies between GPUs arrive. On some boxes the driver says that two GPUs reach each other's
//! memory, and a copy then never ends or brings other bytes (PCIe access control, IOMMU).
//!
//! They are tried in a process of their own, which can be killed: a process that has a hung copy on a GPU
//! waits for it whenever it frees memory there.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;

use cudarc::driver::result::{self, DriverError, device as cu_device, primary_ctx, stream};
use cudarc::driver::sys;

use super::device::driver_reason;
use super::error::CudaError;

/// What became of copies between GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerCopies {
    /// From memory to memory.
    Direct,
    /// The driver takes them, or some of them, through host memory.
    ThroughHost,
    /// They do not arrive, for this reason.
    Broken(String),
}

/// A copy of this size took less than a second on every box it works on.
const BYTES: usize = 1 << 20;

const DIRECT: &str = "direct";
const THROUGH_HOST: &str = "through host";

static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Names the program whose command `probe` calls [`probe`]. Without one nothing is tried, and copies are
/// taken to be what the driver says.
pub fn probe_by(program: PathBuf) {
    // The first who names one is the program itself.
    let _ = PROGRAM.set(program);
}

/// Tries one copy of a megabyte for each pair of GPUs (from, to), in a process of its own, and waits at most
/// `limit` for each.
pub fn peer_copies(pairs: &[(u32, u32)], limit: Duration) -> PeerCopies {
    let Some(program) = PROGRAM.get().filter(|_| !pairs.is_empty()) else {
        return PeerCopies::Direct;
    };
    let mut command = Command::new(program);
    command.arg("probe");
    command.args(pairs.iter().map(|(from, to)| format!("{from}-{to}")));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let spawned = command.stderr(Stdio::null()).spawn();
    let (mut child, output) = match spawned.map(|mut child| (child.stdout.take(), child)) {
        Ok((Some(output), child)) => (child, output),
        Ok((None, _)) => return PeerCopies::Broken("the probe has no output".to_owned()),
        Err(error) => return PeerCopies::Broken(format!("the probe does not start: {error}")),
    };
    let (said, hears) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            // Nobody listens any more when the limit is over.
            if said.send(line).is_err() {
                return;
            }
        }
    });
    let mut found = PeerCopies::Direct;
    for (from, to) in pairs {
        let broken = match hears.recv_timeout(limit) {
            Ok(line) if line == DIRECT => continue,
            Ok(line) if line == THROUGH_HOST => {
                found = PeerCopies::ThroughHost;
                continue;
            }
            Ok(line) => format!("a copy from GPU {from} to GPU {to} {line}"),
            Err(_) => format!(
                "a copy from GPU {from} to GPU {to} did not arrive within {} s",
                limit.as_secs()
            ),
        };
        found = PeerCopies::Broken(broken);
        break;
    }
    // It has done what it can, or hangs; either way there is nothing to hear from it any more.
    let _ = child.kill();
    let _ = child.wait();
    found
}

/// What the process of its own does: tries one copy from GPU `from` to GPU `to`, and gives the line that
/// [`peer_copies`] reads.
pub fn probe(from: u32, to: u32) -> String {
    match copy(from, to) {
        Ok(true) => DIRECT.to_owned(),
        Ok(false) => THROUGH_HOST.to_owned(),
        Err(Unusable::OtherBytes) => "brought other bytes than were sent".to_owned(),
        Err(Unusable::Call(error)) => format!("failed: {error}"),
    }
}

/// Why a copy cannot be relied on.
enum Unusable {
    OtherBytes,
    Call(CudaError),
}

impl From<CudaError> for Unusable {
    fn from(error: CudaError) -> Self {
        Unusable::Call(error)
    }
}

/// A context and a buffer on one GPU, given back when dropped.
struct Place {
    ordinal: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    buffer: sys::CUdeviceptr,
}

fn call<T>(
    ordinal: u32,
    call: &'static str,
    answer: Result<T, DriverError>,
) -> Result<T, CudaError> {
    answer.map_err(|error| CudaError::Call {
        ordinal,
        call,
        reason: driver_reason(error),
    })
}

impl Place {
    fn open(ordinal: u32) -> Result<Self, CudaError> {
        let device = call(ordinal, "cuDeviceGet", cu_device::get(ordinal as i32))?;
        // SAFETY: the device was returned by the driver; released by `drop`.
        let context = unsafe { primary_ctx::retain(device) };
        let mut place = Place {
            ordinal,
            device,
            context: call(ordinal, "cuDevicePrimaryCtxRetain", context)?,
            buffer: 0,
        };
        place.enter()?;
        // SAFETY: freed by `drop`.
        let buffer = unsafe { result::malloc_sync(BYTES) };
        place.buffer = call(ordinal, "cuMemAlloc", buffer)?;
        Ok(place)
    }

    fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context is retained.
        let entered = unsafe { result::ctx::set_current(self.context) };
        call(self.ordinal, "cuCtxSetCurrent", entered)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // An error has nobody to hear it: the probe has its answer.
        let _ = self.enter();
        // SAFETY: made by `open`, used by nobody after this.
        unsafe {
            if self.buffer != 0 {
                let _ = result::free_sync(self.buffer);
            }
            let _ = primary_ctx::release(self.device);
        }
    }
}

/// Whether the copy went directly, if it arrived.
fn copy(from: u32, to: u32) -> Result<bool, Unusable> {
    super::library::open_driver()?;
    let (source, target) = (Place::open(from)?, Place::open(to)?);
    source.enter()?;
    let mut direct = 0;
    // SAFETY: both devices were returned by the driver; writes one integer.
    let can = unsafe { sys::cuDeviceCanAccessPeer(&mut direct, target.device, source.device) };
    call(from, "cuDeviceCanAccessPeer", can.result())?;
    // Every word another, and none what fresh memory holds.
    let words = 1..=(BYTES / size_of::<u32>()) as u32;
    let sent: Vec<u32> = words.map(|word| word.wrapping_mul(0x9e37_79b9)).collect();
    // SAFETY: the buffer holds BYTES bytes.
    let filled = unsafe { result::memcpy_htod_sync(source.buffer, &sent) };
    call(from, "cuMemcpyHtoD", filled)?;
    // The copy is done only when it was waited for: DMA may still be under way.
    call(from, "cuCtxSynchronize", result::ctx::synchronize())?;
    target.enter()?;
    if direct != 0 {
        // SAFETY: both contexts are alive.
        let enabled = unsafe { sys::cuCtxEnablePeerAccess(source.context, 0) }.result();
        match enabled {
            Err(error) if error.0 != sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {
                call(to, "cuCtxEnablePeerAccess", Err(error))?;
            }
            _ => {}
        }
    }
    let mut found = vec![0_u32; sent.len()];
    let queue = stream::create(stream::StreamKind::NonBlocking);
    let queue = call(to, "cuStreamCreate", queue)?;
    // SAFETY: everything named is alive until the stream is destroyed, which is after its work is done.
    let copied = unsafe {
        let copied = sys::cuMemcpyPeerAsync(
            target.buffer,
            target.context,
            source.buffer,
            source.context,
            BYTES,
            queue,
        );
        let copied = copied
            .result()
            .and_then(|()| stream::synchronize(queue))
            .and_then(|()| result::memcpy_dtoh_sync(&mut found, target.buffer));
        copied.and(stream::destroy(queue))
    };
    call(to, "cuMemcpyPeerAsync", copied)?;
    match found == sent {
        true => Ok(direct != 0),
        false => Err(Unusable::OtherBytes),
    }
}
