//! The CUDA backend: our kernels (kernels/*.cu) and cuBLASLt on one GPU per worker thread.
//!
//! Reading order: [`Cuda`] below; `device` (context, stream, launch), `memory` and `staging`; `library`,
//! `source`, `compile`, `cache` and `module`, which bring the kernels onto the device; `ops`, and one file
//! per family of kernels, named as its source.

mod adapter;
mod attention;
mod blas;
mod cache;
mod compile;
mod device;
mod dropout;
mod elementwise;
mod error;
mod events;
mod library;
mod linear;
mod loss;
mod memory;
mod module;
mod nccl_library;
mod norm;
mod ops;
mod optim;
mod prepare;
mod probe;
mod product;
mod quant;
mod rotary;
mod rows;
mod source;
mod spans;
mod staging;
mod survey;
mod synthetic;
mod tiles;
mod timing;

use std::rc::Rc;
use std::sync::Arc;

pub use compile::{Compiled, compile_kernels, nvrtc};
pub use error::CudaError;
pub use events::{DevicePlace, Event, SideStream};
pub use memory::{ALIGNMENT, CudaBuffer};
pub use nccl_library::{NcclLibrary, nccl};
pub use prepare::{GeluAt, LinearWork, MemoryPlan, NCCL_MEMORY_PER_PEER, OWN_MEMORY, OpRooms};
pub use probe::{PeerCopies, peer_copies, probe, probe_by};
pub use survey::{GpuInfo, Survey, check, free_memory, survey, visible};

use super::{BackendError, Pulse};
use device::{Device, Pointer};
use memory::{Memory, Scratch};
use module::Modules;
use spans::SpanTable;
use staging::Staging;

type Result<T> = std::result::Result<T, BackendError>;

/// A GPU, storing weights and activations as f16, computing in f32.
///
/// Everything is queued on one stream in the order of the calls; only [`read`](super::Backend::read) waits.
pub struct Cuda {
    blas: blas::Blas,
    norm: norm::Kernels,
    elementwise: elementwise::Kernels,
    rows: rows::Kernels,
    linear: linear::Kernels,
    adapter: adapter::Kernels,
    rotary: rotary::Kernels,
    attention: attention::Kernels,
    dropout: dropout::Kernels,
    loss: loss::Kernels,
    optim: optim::Kernels,
    quant: quant::Kernels,
    synthetic: synthetic::Kernels,
    span_table: SpanTable,
    scratch: Scratch,
    staging: Staging,
    memory: Memory,
    /// After everything that launches from them.
    _modules: Modules,
    device: Rc<Device>,
}

impl Cuda {
    /// The GPU with CUDA's number `ordinal`, for the thread that calls.
    ///
    /// # Errors
    /// Driver or libraries are missing or too old, there is no such GPU, it is too old, or a kernel
    /// does not compile.
    pub fn new(ordinal: u32) -> Result<Self> {
        Cuda::with_pulse(ordinal, &Arc::default())
    }

    /// The same with signs of life: kernels compiled, marks reached. Every wait for the GPU ends when the
    /// pulse is stopped.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    pub fn with_pulse(ordinal: u32, pulse: &Arc<Pulse>) -> Result<Self> {
        Cuda::open(ordinal, pulse, None)
    }

    /// The GPU; with a plan, all its memory is taken at once, after the kernels and before all else.
    fn open(ordinal: u32, pulse: &Arc<Pulse>, plan: Option<&MemoryPlan>) -> Result<Self> {
        let device = Device::open(ordinal, pulse).map_err(BackendError::Cuda)?;
        let device = Rc::new(device);
        let modules = Modules::load(&device)?;
        let memory = Memory::new(&device);
        if let Some(MemoryPlan { buffers, rooms }) = plan {
            let bytes = buffers + rooms.bytes(Some(device.capability()));
            memory.reserve(bytes as usize)?;
        }
        Ok(Cuda {
            blas: blas::Blas::new(&device, &memory)?,
            norm: norm::Kernels::load(&modules)?,
            elementwise: elementwise::Kernels::load(&modules)?,
            rows: rows::Kernels::load(&modules)?,
            linear: linear::Kernels::load(&modules)?,
            adapter: adapter::Kernels::load(&modules)?,
            rotary: rotary::Kernels::load(&modules)?,
            attention: attention::Kernels::load(&modules, device.capability())?,
            dropout: dropout::Kernels::load(&modules)?,
            loss: loss::Kernels::load(&modules)?,
            optim: optim::Kernels::load(&modules)?,
            quant: quant::Kernels::load(&modules)?,
            synthetic: synthetic::Kernels::load(&modules)?,
            span_table: SpanTable::new(),
            scratch: Scratch::new(),
            staging: Staging::new(&device)?,
            memory,
            _modules: modules,
            device,
        })
    }

    /// At least `bytes` bytes of room for one op, with whatever is in them; good until the next call.
    fn scratch(&self, bytes: usize) -> Result<Pointer> {
        self.scratch.get(&self.memory, bytes)
    }
}
