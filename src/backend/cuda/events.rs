//! Points in a stream that other streams and the host can wait for, and streams beside the one that
//! computes.

use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::Cuda;
use super::device::{Device, Pointer};
use super::memory::CudaBuffer;
use crate::backend::{BackendError, Plain};

type Result<T> = std::result::Result<T, BackendError>;

/// A point in a stream. One thread records it; streams of any device and thread may wait for it.
pub struct Event {
    raw: sys::CUevent,
}

// SAFETY: the driver's event functions may be called from any thread; an event is destroyed once, when
// nobody holds it any more.
unsafe impl Send for Event {}
// SAFETY: as above; recording and waiting are calls of the driver, which orders them.
unsafe impl Sync for Event {}

impl Event {
    /// An event that has not been recorded: whoever waits for it goes on at once.
    pub(super) fn new(device: &Device) -> Result<Self> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)
    }

    /// An event that also tells when it was reached.
    pub(super) fn timed(device: &Device) -> Result<Self> {
        Self::with_flags(device, sys::CUevent_flags::CU_EVENT_DEFAULT)
    }

    fn with_flags(device: &Device, flags: sys::CUevent_flags) -> Result<Self> {
        let raw = device.check("cuEventCreate", result::event::create(flags))?;
        Ok(Event { raw })
    }

    /// Seconds between two timed events that have passed, to about half a microsecond (CUDA Driver API,
    /// cuEventElapsedTime).
    pub(super) fn seconds_since(&self, device: &Device, begin: &Event) -> Result<f64> {
        // SAFETY: both events are alive.
        let milliseconds = unsafe { result::event::elapsed(begin.raw, self.raw) };
        Ok(f64::from(device.check("cuEventElapsedTime", milliseconds)?) / 1e3)
    }

    /// Records everything queued on `stream` so far.
    pub(super) fn record(&self, device: &Device, stream: sys::CUstream) -> Result<()> {
        // SAFETY: event and stream are alive.
        let recorded = unsafe { result::event::record(self.raw, stream) };
        device.check("cuEventRecord", recorded)
    }

    /// Lets what is queued on `stream` from here on wait for the event.
    pub(super) fn delay(&self, device: &Device, stream: sys::CUstream) -> Result<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream are alive; the driver remembers what the event recorded.
        let waits = unsafe { result::stream::wait_event(stream, self.raw, flags) };
        device.check("cuStreamWaitEvent", waits)
    }

    /// Whether what it recorded is done.
    pub(super) fn passed(&self, device: &Device) -> Result<bool> {
        // SAFETY: the event is alive.
        match unsafe { result::event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => device.check("cuEventQuery", Err(error)),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `new`. The driver keeps what streams wait for. An error here was or will be
        // seen by a call that matters.
        let _ = unsafe { result::event::destroy(self.raw) };
    }
}

/// A stream for transfers, beside the one that computes.
pub struct SideStream {
    device: Rc<Device>,
    raw: sys::CUstream,
}

impl SideStream {
    /// The driver's handle, for libraries that queue on it.
    pub fn raw(&self) -> sys::CUstream {
        self.raw
    }

    /// Records everything queued here so far.
    ///
    /// # Errors
    /// The device fails.
    pub fn record(&self, event: &Event) -> Result<()> {
        event.record(&self.device, self.raw)
    }

    /// Lets what is queued here from now on wait for `event`.
    ///
    /// # Errors
    /// The device fails.
    pub fn wait(&self, event: &Event) -> Result<()> {
        event.delay(&self.device, self.raw)
    }

    /// Queues a copy of `bytes` bytes to this GPU, from its own memory or from another one's: directly where
    /// the two reach each other, else CUDA goes through host memory.
    ///
    /// # Errors
    /// The device fails.
    pub fn copy(&self, to: DevicePlace, from: DevicePlace, bytes: usize) -> Result<()> {
        self.device.reach(from.context)?;
        // SAFETY: callers give places inside buffers that live until the copy is done, in contexts
        // that are alive as long.
        let copied = unsafe {
            sys::cuMemcpyPeerAsync(
                to.pointer,
                to.context,
                from.pointer,
                from.context,
                bytes,
                self.raw,
            )
            .result()
        };
        self.device.check("cuMemcpyPeerAsync", copied)
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        // SAFETY: made by `Cuda::side_stream`; what is queued is finished by the driver. An error here
        // was or will be seen by a call that matters.
        let _ = unsafe { result::stream::destroy(self.raw) };
    }
}

/// A place in the memory of a GPU of this process.
#[derive(Clone, Copy, Debug)]
pub struct DevicePlace {
    pub(super) context: sys::CUcontext,
    pub(super) pointer: sys::CUdeviceptr,
}

// SAFETY: an address and a handle; the driver's functions take them from any thread.
unsafe impl Send for DevicePlace {}

impl DevicePlace {
    /// The address, for libraries.
    pub fn pointer(self) -> sys::CUdeviceptr {
        self.pointer
    }
}

impl Cuda {
    /// An event of this GPU.
    ///
    /// # Errors
    /// The device fails.
    pub fn event(&self) -> Result<Event> {
        Event::new(&self.device)
    }

    /// A stream beside the one that computes.
    ///
    /// # Errors
    /// The device fails.
    pub fn side_stream(&self) -> Result<SideStream> {
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking);
        Ok(SideStream {
            raw: self.device.check("cuStreamCreate", raw)?,
            device: Rc::clone(&self.device),
        })
    }

    /// Records everything computed so far.
    ///
    /// # Errors
    /// The device fails.
    pub fn record(&self, event: &Event) -> Result<()> {
        event.record(&self.device, self.device.stream())
    }

    /// Lets what is computed from here on wait for `event`.
    ///
    /// # Errors
    /// The device fails.
    pub fn wait(&self, event: &Event) -> Result<()> {
        event.delay(&self.device, self.device.stream())
    }

    /// Tells the pulse how far the GPU is, and notices when the worker is to give up. To be called in
    /// every loop that waits on the host.
    ///
    /// # Errors
    /// The pulse was stopped, or the device fails.
    pub fn glance(&self) -> Result<()> {
        self.device.glance()
    }

    /// Calls `check` in every wait for the GPU from here on, which ends with the error it finds.
    pub fn watch(&self, check: impl Fn() -> Result<()> + 'static) {
        self.device.watch(check);
    }

    /// Where a buffer stands.
    pub fn place<T: Plain>(&self, buffer: &CudaBuffer<T>) -> DevicePlace {
        let Pointer(pointer) = buffer.at();
        DevicePlace {
            context: self.device.context(),
            pointer,
        }
    }
}
