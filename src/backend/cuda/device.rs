//! One GPU: its context and stream, and what is queued there.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::result::{DriverError, device as cu_device, primary_ctx, stream as cu_stream};
use cudarc::driver::{result, sys};

use super::error::CudaError;
use super::events::Event;
use super::survey;
use super::timing::Timing;
use crate::backend::{BackendError, Pulse, Work};

type Result<T> = std::result::Result<T, BackendError>;

/// A GPU as one worker thread uses it: one context, one stream, everything in the order of the calls.
pub(super) struct Device {
    ordinal: u32,
    name: String,
    /// Compute capability times ten: 86.
    capability: u32,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// Contexts of other GPUs to which the direct way was asked for.
    reached: RefCell<Vec<sys::CUcontext>>,
    stream: sys::CUstream,
    /// Stopped when the worker is to give up.
    pulse: Arc<Pulse>,
    marks: RefCell<Marks>,
    timing: Timing,
    watched: RefCell<Vec<Check>>,
    /// When what is watched was last looked at.
    looked: Cell<Instant>,
}

/// Tells of an error of something beside the streams.
type Check = Box<dyn Fn() -> Result<()>>;

/// Places in the work of the worker that the GPU has not reached yet, and events to use again.
#[derive(Default)]
struct Marks {
    ahead: VecDeque<(Event, u64)>,
    spare: Vec<Event>,
}

/// A wait for the GPU that lasts looks this often; before, it does nothing else.
const NAP: Duration = Duration::from_micros(50);
/// What is watched beside the streams is looked at this often.
const LOOK: Duration = Duration::from_millis(1);
/// Most steps of a small model are over sooner than a nap would be.
const WAKEFUL: Duration = Duration::from_millis(2);

/// What a kernel is launched over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory.
    pub shared: u32,
}

impl Geometry {
    /// `blocks` blocks of `threads` threads.
    pub fn line(blocks: u32, threads: u32) -> Self {
        Geometry {
            grid: [blocks, 1, 1],
            threads,
            shared: 0,
        }
    }

    /// The same with dynamic shared memory.
    pub fn with_shared(self, shared: u32) -> Self {
        Geometry { shared, ..self }
    }
}

/// A function on the device.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub function: sys::CUfunction,
    pub name: &'static str,
    /// What its time counts as.
    pub work: Work,
}

/// A value that a kernel takes as a parameter.
///
/// # Safety
/// The type has the size and layout of the kernel's parameter.
pub(super) unsafe trait Argument {
    /// Where the value stands in host memory.
    fn address(&self) -> *mut c_void {
        std::ptr::from_ref(self).cast::<c_void>().cast_mut()
    }
}

// SAFETY: `u32`, `u64` and `float` of the kernels have these layouts.
unsafe impl Argument for u32 {}
// SAFETY: as above.
unsafe impl Argument for u64 {}
// SAFETY: as above.
unsafe impl Argument for f32 {}

/// A place in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Pointer(pub sys::CUdeviceptr);

// SAFETY: a device pointer is 64 bits on both sides.
unsafe impl Argument for Pointer {}

impl Pointer {
    /// No place.
    pub const NULL: Pointer = Pointer(0);

    /// The place `bytes` further.
    pub fn offset(self, bytes: usize) -> Self {
        Pointer(self.0 + bytes as u64)
    }
}

/// Name and meaning of a driver error.
pub(super) fn driver_reason(error: DriverError) -> String {
    let text = |text: std::result::Result<&std::ffi::CStr, DriverError>| {
        text.map(|text| text.to_string_lossy().into_owned())
    };
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(meaning)) => format!("{name}: {meaning}"),
        _ => format!("error {}", error.0 as u32),
    }
}

/// Whether an error comes from work that was queued before; every later call returns it again.
fn is_lost(error: DriverError) -> bool {
    use sys::CUresult as Result;
    matches!(
        error.0,
        Result::CUDA_ERROR_ILLEGAL_ADDRESS
            | Result::CUDA_ERROR_LAUNCH_TIMEOUT
            | Result::CUDA_ERROR_ASSERT
            | Result::CUDA_ERROR_HARDWARE_STACK_ERROR
            | Result::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | Result::CUDA_ERROR_MISALIGNED_ADDRESS
            | Result::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | Result::CUDA_ERROR_INVALID_PC
            | Result::CUDA_ERROR_LAUNCH_FAILED
            | Result::CUDA_ERROR_ECC_UNCORRECTABLE
    )
}

impl Device {
    /// Opens a GPU for the thread that calls.
    ///
    /// # Errors
    /// Libraries are missing, there is no such device, or it cannot run the kernels.
    pub fn open(ordinal: u32, pulse: &Arc<Pulse>) -> std::result::Result<Self, CudaError> {
        let call = |call: &'static str| {
            move |error: DriverError| CudaError::Call {
                ordinal,
                call,
                reason: driver_reason(error),
            }
        };
        survey::check([ordinal])?;
        let device = cu_device::get(ordinal as i32).map_err(call("cuDeviceGet"))?;
        let name = cu_device::get_name(device).map_err(call("cuDeviceGetName"))?;
        let capability = survey::capability(ordinal, device)?;
        // SAFETY: `device` was returned by the driver; released when `Device` is dropped.
        let context =
            unsafe { primary_ctx::retain(device) }.map_err(call("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: `context` was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(call("cuCtxSetCurrent"))?;
        let stream = cu_stream::create(cu_stream::StreamKind::NonBlocking)
            .map_err(call("cuStreamCreate"))?;
        Ok(Device {
            ordinal,
            name,
            capability,
            device,
            context,
            reached: RefCell::default(),
            stream,
            pulse: Arc::clone(pulse),
            marks: RefCell::default(),
            timing: Timing::default(),
            watched: RefCell::default(),
            looked: Cell::new(Instant::now()),
        })
    }

    /// CUDA's number of the device.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// Compute capability times ten: 86.
    pub fn capability(&self) -> u32 {
        self.capability
    }

    /// The stream that everything runs on.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// The context that everything lives in.
    pub fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// The events of a measurement.
    pub(super) fn timing(&self) -> &Timing {
        &self.timing
    }

    /// Signs of life go here.
    pub fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// The device in words, for messages.
    pub fn title(&self) -> String {
        format!("CUDA device {} ({})", self.ordinal, self.name)
    }

    /// Turns the answer of a driver call into an error that says what was called.
    pub fn check<T>(
        &self,
        call: &'static str,
        answer: std::result::Result<T, DriverError>,
    ) -> Result<T> {
        answer.map_err(|error| {
            let (ordinal, reason) = (self.ordinal, driver_reason(error));
            let is_full = error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
            BackendError::Cuda(match is_lost(error) {
                true => CudaError::Lost {
                    ordinal,
                    noticed: call,
                    reason,
                },
                false if is_full => CudaError::NoMemory { ordinal, call },
                false => CudaError::Call {
                    ordinal,
                    call,
                    reason,
                },
            })
        })
    }

    /// Queues a kernel. A grid without blocks is no work.
    ///
    /// The kernel's parameters are those of its declaration in kernels/*.cu, in order; buffers must be
    /// as large as the kernel's head comment says for the sizes it is given.
    pub fn launch(
        &self,
        kernel: &Kernel,
        geometry: Geometry,
        arguments: &[&dyn Argument],
    ) -> Result<()> {
        let [x, y, z] = geometry.grid;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        const MOST: usize = 32;
        let mut addresses = [std::ptr::null_mut(); MOST];
        debug_assert!(arguments.len() <= MOST);
        for (address, argument) in addresses.iter_mut().zip(arguments) {
            *address = argument.address();
        }
        self.counted(kernel.work, || {
            // SAFETY: the function belongs to a loaded module of this context; the driver copies the
            // arguments, which have the layout that `Argument` promises, during the call. That they fit
            // the kernel's declaration is kept by the launcher of each kernel and its op case.
            let launched = unsafe {
                result::launch_kernel(
                    kernel.function,
                    (x, y, z),
                    (geometry.threads, 1, 1),
                    geometry.shared,
                    self.stream,
                    &mut addresses[..arguments.len()],
                )
            };
            self.check(kernel.name, launched)
        })
    }

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// Something queued failed, or the pulse was stopped meanwhile.
    pub fn synchronize(&self) -> Result<()> {
        let event = match self.marks.borrow_mut().spare.pop() {
            Some(event) => event,
            None => Event::new(self)?,
        };
        event.record(self, self.stream)?;
        self.wait_for(&event)?;
        self.glance()?;
        self.marks.borrow_mut().spare.push(event);
        Ok(())
    }

    /// Waits on the host for an event that was recorded behind everything queued, in small steps.
    ///
    /// # Errors
    /// Something queued failed, or the pulse was stopped meanwhile.
    pub(super) fn wait_for(&self, event: &Event) -> Result<()> {
        let began = Instant::now();
        loop {
            self.glance()?;
            // The marks before it come first: when something has failed, no event tells any more how far
            // the GPU was.
            let marked = !self.marks.borrow().ahead.is_empty();
            if !marked && event.passed(self)? {
                return Ok(());
            }
            match began.elapsed() < WAKEFUL {
                true => std::thread::yield_now(),
                false => std::thread::sleep(NAP),
            }
        }
    }

    /// Lets the pulse reach `place` when everything queued so far is done.
    pub fn mark(&self, place: u64) -> Result<()> {
        let spare = self.marks.borrow_mut().spare.pop();
        let event = match spare {
            Some(event) => event,
            None => Event::new(self)?,
        };
        event.record(self, self.stream)?;
        self.marks.borrow_mut().ahead.push_back((event, place));
        self.glance()
    }

    /// Looks after something beside the streams in every wait from here on.
    pub fn watch(&self, check: impl Fn() -> Result<()> + 'static) {
        self.watched.borrow_mut().push(Box::new(check));
    }

    /// Tells the pulse how far the GPU is.
    ///
    /// # Errors
    /// Something queued or watched failed, or the pulse was stopped.
    pub fn glance(&self) -> Result<()> {
        let stopped = self.pulse.is_stopped();
        // Why it was stopped is told by another worker, unless the cause lies here.
        if stopped || self.looked.get().elapsed() > LOOK {
            self.watched.borrow().iter().try_for_each(|check| check())?;
            self.looked.set(Instant::now());
        }
        if stopped {
            return Err(BackendError::Stopped);
        }
        let mut marks = self.marks.borrow_mut();
        while let Some((event, place)) = marks.ahead.front() {
            if !event.passed(self)? {
                break;
            }
            self.pulse.reach(*place);
            if let Some((event, _)) = marks.ahead.pop_front() {
                marks.spare.push(event);
            }
        }
        Ok(())
    }

    /// Lets copies of this GPU take the direct way to the memory of another one, where there is one.
    pub fn reach(&self, context: sys::CUcontext) -> Result<()> {
        use sys::CUresult as Answer;
        if context == self.context || self.reached.borrow().contains(&context) {
            return Ok(());
        }
        // SAFETY: the other context is alive as long as its worker, which outlives what is copied.
        let answer = unsafe { sys::cuCtxEnablePeerAccess(context, 0) };
        match answer {
            Answer::CUDA_SUCCESS
            | Answer::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
            // Without a direct way the driver goes through host memory.
            | Answer::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
            | Answer::CUDA_ERROR_TOO_MANY_PEERS => {}
            error => return self.check("cuCtxEnablePeerAccess", error.result()),
        }
        self.reached.borrow_mut().push(context);
        Ok(())
    }

    /// Queues setting `bytes` bytes to zero.
    pub fn clear(&self, at: Pointer, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.counted(Work::Elementwise, || {
            // SAFETY: callers give places inside their own allocations.
            let done = unsafe { result::memset_d8_async(at.0, 0, bytes, self.stream) };
            self.check("cuMemsetD8Async", done)
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Nothing can be done about an error here; it was or will be seen by a call that matters.
        let finished = self.synchronize().is_ok();
        *self.marks.get_mut() = Marks::default();
        self.timing = Timing::default();
        // What a hung GPU works on is left to the end of the process: to wait for it would be to hang.
        if !finished && self.pulse.is_stopped() {
            return;
        }
        // SAFETY: stream and context were made by `open` and are used by nobody after this.
        unsafe {
            let _ = cu_stream::destroy(self.stream);
            let _ = primary_ctx::release(self.device);
        }
    }
}
