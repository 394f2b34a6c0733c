//! What can go wrong with a CUDA device, told to the person who owns it.

use std::path::PathBuf;

/// Why a CUDA device could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's library is not there.
    #[error(
        "no CUDA driver found (libcuda.so.1): install NVIDIA's driver, version 525 or newer, and see \
         that `nvidia-smi` works; without a GPU use `--devices cpu`"
    )]
    NoDriver,
    /// A library beside the driver is not there.
    #[error(
        "{library} was not found: `pip install {wheel}` brings it, in the active virtual environment or \
         with --user; so does the CUDA 12 toolkit. MP_TRAIN_CUDA_LIBRARIES names any other folder"
    )]
    NoLibrary {
        /// As in `libnvrtc.so.12`.
        library: &'static str,
        /// The wheel that holds it.
        wheel: &'static str,
    },
    /// The driver is older than what the kernels are compiled for.
    #[error(
        "the CUDA driver supports CUDA {}.{} only and {what} needs CUDA {}.{}: install a newer driver \
         ({driver} or newer)",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    OldDriver {
        /// `cuDriverGetVersion`.
        found: i32,
        /// The same of what is needed.
        needed: i32,
        /// What needs it.
        what: &'static str,
        /// Version of the driver package that has it.
        driver: &'static str,
    },
    /// NCCL is older than what the transport needs.
    #[error(
        "NCCL {found} was found, and 2.18 or newer is needed: `pip install nvidia-nccl-cu12` brings one; \
         `--transport p2p` does without it"
    )]
    OldNccl {
        /// Its version, or what it lacks.
        found: String,
    },
    /// No GPU is visible.
    #[error(
        "the CUDA driver sees no GPU: look at `nvidia-smi` and at CUDA_VISIBLE_DEVICES, or use \
         `--devices cpu`"
    )]
    NoDevice,
    /// There is no such GPU.
    #[error(
        "there is no CUDA device {ordinal}: this machine has {count}, counted from 0; \
         `mp-train devices` lists them"
    )]
    NoSuchDevice {
        /// As asked for.
        ordinal: u32,
        /// How many there are.
        count: usize,
    },
    /// The GPU cannot run the kernels.
    #[error(
        "CUDA device {ordinal} ({name}) has compute capability {major}.{minor}; 7.5 (Turing) or newer \
         is needed"
    )]
    OldDevice {
        /// The device.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Compute capability.
        major: u32,
        /// Compute capability.
        minor: u32,
    },
    /// Another architecture was asked for than the GPU can run or NVRTC knows.
    #[error(
        "MP_TRAIN_KERNEL_ARCH is `{found}`: this GPU and this NVRTC take one of {}",
        .known.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
    )]
    Architecture {
        /// As asked for.
        found: String,
        /// What could be.
        known: Vec<u32>,
    },
    /// A kernel does not compile.
    #[error("kernels/{file} does not compile for {arch}:\n{log}")]
    Compile {
        /// Source file.
        file: String,
        /// As in `sm_86`.
        arch: String,
        /// The compiler's messages.
        log: String,
    },
    /// A folder of kernel sources was given and cannot be read.
    #[error("{}: {reason} (MP_TRAIN_KERNEL_SOURCES names the folder)", path.display())]
    Source {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// The cache of compiled kernels was given and cannot be used.
    #[error(
        "{}: compiled kernels cannot be kept there: {reason}; set MP_TRAIN_KERNEL_CACHE to a folder \
         that can be written",
        path.display()
    )]
    Cache {
        /// The folder or file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// A call of a CUDA library failed.
    #[error("CUDA device {ordinal}: {call} failed: {reason}")]
    Call {
        /// The device.
        ordinal: u32,
        /// The call, or the kernel.
        call: &'static str,
        /// Name and text of the error.
        reason: String,
    },
    /// The GPU is full, beside what was planned for the run.
    #[error(
        "CUDA device {ordinal}: no memory is left for {call}: give the run less of it with \
         memory_per_device, so that more is left beside it, or use a smaller micro_batch_size, shorter \
         rows, recompute = \"block\" or more devices; `nvidia-smi` shows who else is there"
    )]
    NoMemory {
        /// The device.
        ordinal: u32,
        /// The call, the kernel, or the library.
        call: &'static str,
    },
    /// Work that was queued failed, and nothing more can be done on the device by this process.
    #[error(
        "CUDA device {ordinal} failed: {reason}; noticed at {noticed}, which may come some work behind \
         the cause: CUDA_LAUNCH_BLOCKING=1 names the kernel, and the system's log an Xid where the \
         hardware is at fault"
    )]
    Lost {
        /// The device.
        ordinal: u32,
        /// The call, or the kernel, that brought the error.
        noticed: &'static str,
        /// Name and text of the error.
        reason: String,
    },
    /// A call or a transfer of NCCL failed.
    #[error(
        "NCCL: {call} failed on stage {rank}: {reason}; NCCL_DEBUG=INFO makes it say more, \
         --transport p2p does without it"
    )]
    Nccl {
        /// The stage.
        rank: usize,
        /// The call.
        call: &'static str,
        /// The library's words.
        reason: String,
        /// Whether another rank failed, and this one is only told.
        remote: bool,
    },
    /// cuBLASLt has no algorithm for a product.
    #[error("CUDA device {ordinal}: cuBLASLt cannot do a product ({shape}): {reason}")]
    Product {
        /// The device.
        ordinal: u32,
        /// Sizes and types.
        shape: String,
        /// The library's status.
        reason: String,
    },
}

impl CudaError {
    /// Whether the machine or a bug is to blame, not what was asked for.
    pub fn is_machine(&self) -> bool {
        match self {
            CudaError::NoSuchDevice { .. }
            | CudaError::Architecture { .. }
            | CudaError::Cache { .. }
            | CudaError::Source { .. } => false,
            CudaError::NoDriver
            | CudaError::NoLibrary { .. }
            | CudaError::OldDriver { .. }
            | CudaError::OldNccl { .. }
            | CudaError::NoDevice
            | CudaError::OldDevice { .. }
            | CudaError::Compile { .. }
            | CudaError::Call { .. }
            | CudaError::NoMemory { .. }
            | CudaError::Lost { .. }
            | CudaError::Nccl { .. }
            | CudaError::Product { .. } => true,
        }
    }
}
