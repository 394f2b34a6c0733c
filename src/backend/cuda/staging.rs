//! Copies between host and device through pinned memory, so that they neither wait for the stream (as
//! copies from ordinary memory may) nor keep the caller's memory busy.

use std::cell::RefCell;
use std::ffi::c_void;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::device::{Device, Pointer};
use crate::backend::{BackendError, PIECE_BYTES, Plain};

type Result<T> = std::result::Result<T, BackendError>;

const SEGMENTS: usize = 4;
/// A piece of a model's weights. A micro-batch of 8,192 tokens has 192 KiB of ids and positions.
const SEGMENT_BYTES: usize = PIECE_BYTES;

/// A ring of pinned segments; a segment is used again when the copies out of it are done.
pub(super) struct Staging {
    device: Rc<Device>,
    pinned: *mut c_void,
    /// Recorded when the ring left the segment.
    left: [sys::CUevent; SEGMENTS],
    place: RefCell<Place>,
}

struct Place {
    segment: usize,
    used: usize,
}

impl Staging {
    pub fn new(device: &Rc<Device>) -> Result<Self> {
        // SAFETY: freed by `drop` alone.
        let pinned = unsafe { result::malloc_host(SEGMENTS * SEGMENT_BYTES, 0) };
        let mut staging = Staging {
            device: Rc::clone(device),
            pinned: device.check("cuMemHostAlloc", pinned)?,
            left: [std::ptr::null_mut(); SEGMENTS],
            place: RefCell::new(Place {
                segment: 0,
                used: 0,
            }),
        };
        for left in &mut staging.left {
            let event = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            *left = device.check("cuEventCreate", event)?;
        }
        Ok(staging)
    }

    /// Queues a copy to the device; `bytes` may change as soon as this returns.
    pub fn write(&self, to: Pointer, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() > SEGMENT_BYTES {
            // SAFETY: the driver has read ordinary memory before it returns; `to` is inside a buffer
            // of the caller's.
            let copied = unsafe { result::memcpy_htod_async(to.0, bytes, self.device.stream()) };
            return self.device.check("cuMemcpyHtoDAsync", copied);
        }
        let room = self.room(bytes.len())?;
        // SAFETY: `room` gives `bytes.len()` pinned bytes that no copy under way uses.
        let pinned = unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), room, bytes.len());
            std::slice::from_raw_parts(room, bytes.len())
        };
        // SAFETY: the pinned bytes stay as they are until the event of their segment has passed.
        let copied = unsafe { result::memcpy_htod_async(to.0, pinned, self.device.stream()) };
        self.device.check("cuMemcpyHtoDAsync", copied)
    }

    /// Queues a copy of `count` values that `fill` writes into the pinned memory itself; where they are
    /// more than a segment, into ordinary memory.
    pub fn write_with<T: Plain, E: From<BackendError>>(
        &self,
        to: Pointer,
        count: usize,
        fill: impl FnOnce(&mut [T]) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let bytes = count * size_of::<T>();
        if bytes > SEGMENT_BYTES {
            let mut values = vec![T::zeroed(); count];
            fill(&mut values)?;
            return Ok(self.write(to, bytemuck::cast_slice(&values))?);
        }
        let room = self.room(bytes)?.cast::<T>();
        // SAFETY: `room` gives `bytes` pinned bytes, at a multiple of 16, that no copy under way uses
        // and nothing else refers to; any bytes are valid values of a plain type.
        let pinned = unsafe { std::slice::from_raw_parts_mut(room, count) };
        fill(pinned)?;
        let pinned: &[u8] = bytemuck::cast_slice(pinned);
        // SAFETY: the pinned bytes stay as they are until the event of their segment has passed.
        let copied = unsafe { result::memcpy_htod_async(to.0, pinned, self.device.stream()) };
        Ok(self.device.check("cuMemcpyHtoDAsync", copied)?)
    }

    /// Copies from the device and waits for the copy, and so for everything queued before it.
    pub fn read(&self, bytes: &mut [u8], from: Pointer) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let stream = self.device.stream();
        if bytes.len() > SEGMENT_BYTES {
            // SAFETY: `from` is inside a buffer of the caller's; into ordinary memory the driver has
            // copied before it returns, and the synchronisation makes sure of it.
            let copied = unsafe { result::memcpy_dtoh_async(bytes, from.0, stream) };
            self.device.check("cuMemcpyDtoHAsync", copied)?;
            return self.device.synchronize();
        }
        let room = self.room(bytes.len())?;
        // SAFETY: `room` gives that many pinned bytes; nothing else refers to them.
        let pinned = unsafe { std::slice::from_raw_parts_mut(room, bytes.len()) };
        // SAFETY: both ends live until the synchronisation below.
        let copied = unsafe { result::memcpy_dtoh_async(pinned, from.0, stream) };
        self.device.check("cuMemcpyDtoHAsync", copied)?;
        self.device.synchronize()?;
        bytes.copy_from_slice(pinned);
        Ok(())
    }

    /// `bytes` pinned bytes, at most a segment.
    fn room(&self, bytes: usize) -> Result<*mut u8> {
        let mut place = self.place.borrow_mut();
        if place.used + bytes > SEGMENT_BYTES {
            let device = &self.device;
            // SAFETY: event and stream are alive.
            let recorded =
                unsafe { result::event::record(self.left[place.segment], device.stream()) };
            device.check("cuEventRecord", recorded)?;
            place.segment = (place.segment + 1) % SEGMENTS;
            place.used = 0;
            // SAFETY: as above. An event never recorded counts as passed.
            let passed = unsafe { result::event::query(self.left[place.segment]) };
            if passed.is_err() {
                // SAFETY: as above.
                let waited = unsafe { result::event::synchronize(self.left[place.segment]) };
                device.check("cuEventSynchronize", waited)?;
            }
        }
        let at = place.segment * SEGMENT_BYTES + place.used;
        place.used += bytes.next_multiple_of(16);
        // SAFETY: `at + bytes` is at most SEGMENTS * SEGMENT_BYTES.
        Ok(unsafe { self.pinned.cast::<u8>().add(at) })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Copies may be under way; errors here are seen by the next call that matters.
        let _ = self.device.synchronize();
        // SAFETY: made by `new`, used by nobody after this.
        unsafe {
            for event in self.left.into_iter().filter(|event| !event.is_null()) {
                let _ = result::event::destroy(event);
            }
            let _ = result::free_host(self.pinned);
        }
    }
}
