//! Whether copies between GPUs arrive. On some boxes the driver says that two GPUs reach each other's
//! memory, and a copy then never ends or brings other bytes (PCIe access control, IOMMU).

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use cudarc::driver::result::{self, DriverError, device as cu_device, primary_ctx, stream};
use cudarc::driver::sys;

use super::device::driver_reason;
use super::error::CudaError;

/// What became of copies between two GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerCopies {
    /// From memory to memory.
    Direct,
    /// The driver takes them through host memory.
    ThroughHost,
    /// They do not arrive, for this reason.
    Broken(String),
}

/// A copy of this size took less than a second on every box it works on.
const BYTES: usize = 1 << 20;

/// Copies once from GPU `from` to GPU `to`, for at most `limit`. What hangs is left behind, with its
/// thread and its megabyte.
///
/// # Errors
/// A call of the driver fails.
pub fn peer_copies(from: u32, to: u32, limit: Duration) -> Result<PeerCopies, CudaError> {
    let (answer, answers) = channel();
    let thread = std::thread::Builder::new().name(format!("probe-{from}-{to}"));
    let spawned = thread.spawn(move || {
        // Nobody listens any more when the limit is over.
        let _ = answer.send(copy(from, to));
    });
    if let Err(error) = spawned {
        return Err(CudaError::Call {
            ordinal: from,
            call: "the thread that probes copies",
            reason: error.to_string(),
        });
    }
    match answers.recv_timeout(limit) {
        Ok(found) => found,
        Err(RecvTimeoutError::Disconnected) => Ok(PeerCopies::Broken(format!(
            "the thread that copied from GPU {from} to GPU {to} ended without a word"
        ))),
        Err(RecvTimeoutError::Timeout) => {
            let seconds = limit.as_secs();
            Ok(PeerCopies::Broken(format!(
                "a copy from GPU {from} to GPU {to} did not arrive within {seconds} s"
            )))
        }
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

fn copy(from: u32, to: u32) -> Result<PeerCopies, CudaError> {
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
    if found != sent {
        return Ok(PeerCopies::Broken(format!(
            "a copy from GPU {from} to GPU {to} brought other bytes than were sent"
        )));
    }
    Ok(match direct {
        0 => PeerCopies::ThroughHost,
        _ => PeerCopies::Direct,
    })
}
