//! Device memory: one arena sized before the run, buffers in it, and allocations of their own for
//! what is not part of a run.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::device::{Argument, Device, Pointer};
use crate::backend::{BackendError, MemoryUse, Plain};

type Result<T> = std::result::Result<T, BackendError>;

/// Every buffer starts at a multiple of this, as an allocation of the driver's does: what 16-byte
/// loads, cuBLASLt and coalescing want.
pub const ALIGNMENT: usize = 256;

/// Bytes that a buffer of `bytes` bytes takes in the arena.
pub(super) fn rounded(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// One allocation of the driver's, freed with its last user.
struct Allocation {
    at: sys::CUdeviceptr,
    device: Rc<Device>,
}

impl Allocation {
    fn new(device: &Rc<Device>, bytes: usize) -> Result<Self> {
        // SAFETY: the memory is freed by `drop` alone.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(at) => Ok(Allocation {
                at,
                device: Rc::clone(device),
            }),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(BackendError::OutOfMemory {
                    device: device.title(),
                    bytes,
                })
            }
            Err(error) => device.check("cuMemAlloc", Err(error)),
        }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // What is queued may still use the memory. An error here is seen by the next call that
        // matters.
        if self.device.synchronize().is_err() && self.device.pulse().is_stopped() {
            // Freeing waits for the GPU, and this one may never answer.
            return;
        }
        // SAFETY: allocated by `new`, and nobody holds it any more.
        let _ = unsafe { result::free_sync(self.at) };
    }
}

struct Arena {
    allocation: Rc<Allocation>,
    bytes: usize,
    used: Cell<usize>,
}

/// The memory of one device.
pub(super) struct Memory {
    device: Rc<Device>,
    arena: RefCell<Option<Arena>>,
    /// Bytes of buffers that had no room in the arena.
    beside: Cell<usize>,
}

impl Memory {
    pub fn new(device: &Rc<Device>) -> Self {
        Memory {
            device: Rc::clone(device),
            arena: RefCell::new(None),
            beside: Cell::new(0),
        }
    }

    /// Takes `bytes` bytes at once: what buffers of together that much take, each of them [`rounded`].
    /// They come from there until it is full.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        let allocation = Rc::new(Allocation::new(&self.device, bytes)?);
        *self.arena.borrow_mut() = Some(Arena {
            allocation,
            bytes,
            used: Cell::new(0),
        });
        Ok(())
    }

    /// Start and bytes of what is left of the arena.
    pub fn unused(&self) -> Option<(Pointer, usize)> {
        let arena = self.arena.borrow();
        arena.as_ref().map(|arena| {
            let used = arena.used.get();
            let start = Pointer(arena.allocation.at).offset(used);
            (start, arena.bytes - used)
        })
    }

    /// What was planned, and what was taken of it so far; nothing where nothing was planned.
    pub fn used(&self) -> Option<MemoryUse> {
        let arena = self.arena.borrow();
        arena.as_ref().map(|arena| MemoryUse {
            planned: arena.bytes as u64,
            used: arena.used.get() as u64,
            beside: self.beside.get() as u64,
        })
    }

    /// Room for `len` values, not cleared.
    pub fn buffer<T: Plain>(&self, len: usize) -> Result<CudaBuffer<T>> {
        let bytes = len * size_of::<T>();
        if bytes == 0 {
            return Ok(CudaBuffer {
                at: Pointer::NULL,
                len,
                _owner: None,
                values: PhantomData,
            });
        }
        let size = rounded(bytes);
        if let Some(arena) = &*self.arena.borrow() {
            let used = arena.used.get();
            if arena.bytes - used >= size {
                arena.used.set(used + size);
                return Ok(CudaBuffer {
                    at: Pointer(arena.allocation.at).offset(used),
                    len,
                    _owner: Some(Rc::clone(&arena.allocation)),
                    values: PhantomData,
                });
            }
        }
        let allocation = Allocation::new(&self.device, bytes)?;
        self.beside.set(self.beside.get() + size);
        Ok(CudaBuffer {
            at: Pointer(allocation.at),
            len,
            _owner: Some(Rc::new(allocation)),
            values: PhantomData,
        })
    }
}

/// Memory on a GPU.
pub struct CudaBuffer<T> {
    at: Pointer,
    len: usize,
    _owner: Option<Rc<Allocation>>,
    values: PhantomData<T>,
}

impl<T: Plain> CudaBuffer<T> {
    /// Where it starts.
    pub(super) fn at(&self) -> Pointer {
        self.at
    }

    /// Where value `index` stands.
    pub(super) fn at_index(&self, index: usize) -> Pointer {
        debug_assert!(index <= self.len);
        self.at.offset(index * size_of::<T>())
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: what a kernel gets is the pointer, which `address` returns the place of.
unsafe impl<T: Plain> Argument for CudaBuffer<T> {
    fn address(&self) -> *mut std::ffi::c_void {
        self.at.address()
    }
}

/// Device memory that one op at a time uses; grows to what was asked for most.
pub(super) struct Scratch {
    room: RefCell<CudaBuffer<u32>>,
}

impl Scratch {
    pub fn new() -> Self {
        Scratch {
            room: RefCell::new(CudaBuffer {
                at: Pointer::NULL,
                len: 0,
                _owner: None,
                values: PhantomData,
            }),
        }
    }

    /// At least `bytes` bytes, with whatever is in them; good until the next call. What was there before
    /// stays taken where it came from an arena, so a run asks for its most first.
    pub fn get(&self, memory: &Memory, bytes: usize) -> Result<Pointer> {
        let mut room = self.room.borrow_mut();
        if room.len() * 4 < bytes {
            *room = memory.buffer(bytes.div_ceil(4))?;
        }
        Ok(room.at())
    }
}
