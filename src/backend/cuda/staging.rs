//! Copies between host and device through pinned memory, so that they neither wait for the stream (as
//! copies from ordinary memory may) nor keep the caller's memory busy.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::rc::Rc;

use crossbeam::channel::{Receiver, RecvError, Sender, bounded};
use cudarc::driver::{result, sys};

use super::device::{Device, Pointer};
use crate::backend::{BackendError, PIECE_BYTES, Plain};

type Result<T> = std::result::Result<T, BackendError>;

const SEGMENTS: usize = 4;
/// Threads that fill segments. What they fill, of files in the system's cache, is converted or quantised on
/// the way, which takes longer than the copy to the device.
const READERS: usize = 2;
/// Segments that are filled or wait for their copy to be queued; the copy out of the last one goes on.
const UNDER_WAY: usize = SEGMENTS - 1;
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

/// A piece for a reader: where it begins among the values, the pinned memory it goes to, and who waits.
struct Piece<'a, T, E> {
    start: usize,
    room: &'a mut [T],
    filled: Sender<std::result::Result<(), E>>,
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

    /// Queues copies of `len` values to where `to` says for the first of each piece. Threads of their own
    /// let `fill` write pieces into the pinned memory itself, while this one queues what is filled, piece by
    /// piece in order; pieces that are longer than a segment, or all in one, are filled here.
    ///
    /// # Errors
    /// Of the device, or of `fill` for the first piece that it fails for.
    pub fn write_pieces<T: Plain, E: From<BackendError> + Send>(
        &self,
        len: usize,
        piece_len: usize,
        to: impl Fn(usize) -> Pointer,
        fill: impl Fn(usize, &mut [T]) -> std::result::Result<(), E> + Sync,
    ) -> std::result::Result<(), E> {
        let count = |start| piece_len.min(len - start);
        if len <= piece_len || piece_len * size_of::<T>() > SEGMENT_BYTES {
            for start in (0..len).step_by(piece_len) {
                self.write_with(to(start), count(start), |piece| fill(start, piece))?;
            }
            return Ok(());
        }
        self.leave()?;
        std::thread::scope(|scope| {
            let (give, tasks) = bounded::<Piece<'_, T, E>>(UNDER_WAY);
            for _ in 0..READERS {
                let (tasks, fill) = (tasks.clone(), &fill);
                let reader = std::thread::Builder::new().spawn_scoped(scope, move || {
                    for Piece {
                        start,
                        room,
                        filled,
                    } in tasks
                    {
                        // Nobody waits for it any more where an earlier piece failed.
                        let _ = filled.send(fill(start, room));
                    }
                });
                reader.map_err(|error| BackendError::Threads {
                    threads: READERS,
                    reason: error.to_string(),
                })?;
            }
            let mut under_way = VecDeque::with_capacity(UNDER_WAY);
            let mut starts = (0..len).step_by(piece_len);
            loop {
                let next = starts.next();
                if (next.is_none() || under_way.len() == UNDER_WAY)
                    && let Some((start, segment, filled)) = under_way.pop_front()
                {
                    let filled: Receiver<std::result::Result<(), E>> = filled;
                    match filled.recv() {
                        Ok(filled) => filled?,
                        // The reader panicked, which the scope passes on.
                        Err(RecvError) => return Ok(()),
                    }
                    self.queue(to(start), segment, count(start) * size_of::<T>())?;
                }
                let Some(start) = next else {
                    match under_way.is_empty() {
                        true => return Ok(()),
                        false => continue,
                    }
                };
                let segment = self.enter_next()?;
                // Nothing else is put there.
                self.place.borrow_mut().used = SEGMENT_BYTES;
                // SAFETY: a segment is aligned and long enough; no copy out of it is under way, and it is
                // entered again only when this piece was taken out of `under_way`, its reader done with
                // it; any bytes are valid values of a plain type.
                let room = unsafe {
                    std::slice::from_raw_parts_mut(self.segment(segment).cast::<T>(), count(start))
                };
                let (filled, awaited) = bounded(1);
                under_way.push_back((start, segment, awaited));
                let piece = Piece {
                    start,
                    room,
                    filled,
                };
                if give.send(piece).is_err() {
                    return Ok(());
                }
            }
        })
    }

    /// Queues a copy of the first bytes of a segment, and records when it is done.
    fn queue(&self, to: Pointer, segment: usize, bytes: usize) -> Result<()> {
        // SAFETY: a filled segment; nobody writes to it before its event has passed.
        let pinned = unsafe { std::slice::from_raw_parts(self.segment(segment), bytes) };
        // SAFETY: as above.
        let copied = unsafe { result::memcpy_htod_async(to.0, pinned, self.device.stream()) };
        self.device.check("cuMemcpyHtoDAsync", copied)?;
        self.record(segment)
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
        if self.place.borrow().used + bytes > SEGMENT_BYTES {
            self.leave()?;
            self.enter_next()?;
        }
        let mut place = self.place.borrow_mut();
        let used = place.used;
        place.used += bytes.next_multiple_of(16);
        // SAFETY: `used + bytes` is at most SEGMENT_BYTES.
        Ok(unsafe { self.segment(place.segment).add(used) })
    }

    /// Where a segment begins.
    fn segment(&self, segment: usize) -> *mut u8 {
        // SAFETY: there are SEGMENTS of them.
        unsafe { self.pinned.cast::<u8>().add(segment * SEGMENT_BYTES) }
    }

    /// Records when the copies out of the present segment are done.
    fn leave(&self) -> Result<()> {
        let segment = self.place.borrow().segment;
        self.record(segment)
    }

    fn record(&self, segment: usize) -> Result<()> {
        // SAFETY: event and stream are alive.
        let recorded = unsafe { result::event::record(self.left[segment], self.device.stream()) };
        self.device.check("cuEventRecord", recorded)
    }

    /// Goes on to the next segment, when the copies out of it are done.
    fn enter_next(&self) -> Result<usize> {
        let segment = (self.place.borrow().segment + 1) % SEGMENTS;
        *self.place.borrow_mut() = Place { segment, used: 0 };
        // SAFETY: the event is alive. One never recorded counts as passed.
        let passed = unsafe { result::event::query(self.left[segment]) };
        if passed.is_err() {
            // SAFETY: as above.
            let waited = unsafe { result::event::synchronize(self.left[segment]) };
            self.device.check("cuEventSynchronize", waited)?;
        }
        Ok(segment)
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
