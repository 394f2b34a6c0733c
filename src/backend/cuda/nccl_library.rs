//! NCCL's functions, found at run time.
//!
//! The types are those of the bindings. Their own loader is not used: it looks for `libnccl.so` alone,
//! where NVIDIA's wheel brings `libnccl.so.2`, and ends the process where a function is missing.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use cudarc::nccl::sys::{
    cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId,
};

use super::error::CudaError;
use super::library::{self, Wanted};

/// Declares the table of functions and how it is filled.
macro_rules! functions {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal: fn($($argument:ty),*) -> $answer:ty;)*) => {
        /// NCCL's functions, by their names without `nccl`.
        #[derive(Clone, Copy)]
        pub struct NcclLibrary {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) -> $answer,)*
        }

        impl NcclLibrary {
            fn read(library: &libloading::Library) -> Result<Self, libloading::Error> {
                // SAFETY: the types are those of nccl.h 2.24, whose functions keep theirs.
                unsafe {
                    Ok(NcclLibrary { $($name: *library.get($symbol)?,)* })
                }
            }
        }
    };
}

functions! {
    /// `ncclGetVersion`: 22603 for 2.26.3.
    get_version = b"ncclGetVersion": fn(*mut c_int) -> ncclResult_t;
    /// `ncclGetUniqueId`
    get_unique_id = b"ncclGetUniqueId": fn(*mut ncclUniqueId) -> ncclResult_t;
    /// `ncclCommInitRankConfig`
    comm_init_rank_config = b"ncclCommInitRankConfig":
        fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> ncclResult_t;
    /// `ncclCommGetAsyncError`
    comm_get_async_error = b"ncclCommGetAsyncError":
        fn(ncclComm_t, *mut ncclResult_t) -> ncclResult_t;
    /// `ncclCommAbort`
    comm_abort = b"ncclCommAbort": fn(ncclComm_t) -> ncclResult_t;
    /// `ncclCommDestroy`
    comm_destroy = b"ncclCommDestroy": fn(ncclComm_t) -> ncclResult_t;
    /// `ncclGetErrorString`
    get_error_string = b"ncclGetErrorString": fn(ncclResult_t) -> *const c_char;
    /// `ncclGetLastError`
    get_last_error = b"ncclGetLastError": fn(ncclComm_t) -> *const c_char;
    /// `ncclGroupStart`
    group_start = b"ncclGroupStart": fn() -> ncclResult_t;
    /// `ncclGroupEnd`
    group_end = b"ncclGroupEnd": fn() -> ncclResult_t;
    /// `ncclSend`
    send = b"ncclSend":
        fn(*const c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
    /// `ncclRecv`
    recv = b"ncclRecv":
        fn(*mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t) -> ncclResult_t;
    /// `ncclAllReduce`
    all_reduce = b"ncclAllReduce":
        fn(*const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t)
            -> ncclResult_t;
}

const NCCL: Wanted = Wanted {
    stem: "libnccl",
    file: "libnccl.so.2",
    wheel: "nvidia-nccl-cu12",
    present: || open().is_some(),
};

/// Lowest version whose non-blocking communicators do what is needed here: 2.18.
const LOWEST_VERSION: i32 = 21_800;

fn open() -> Option<libloading::Library> {
    ["libnccl.so.2", "libnccl.so"].into_iter().find_map(|name| {
        // SAFETY: NCCL's initialisers do no harm.
        unsafe { libloading::Library::new(name) }.ok()
    })
}

/// NCCL, opened once for the process.
///
/// # Errors
/// The library is missing, or too old.
pub fn nccl() -> Result<&'static NcclLibrary, CudaError> {
    static LIBRARY: OnceLock<NcclLibrary> = OnceLock::new();
    if let Some(library) = LIBRARY.get() {
        return Ok(library);
    }
    NCCL.open()?;
    let missing = || CudaError::NoLibrary {
        library: NCCL.file,
        wheel: NCCL.wheel,
    };
    let library = open().ok_or_else(missing)?;
    let functions = NcclLibrary::read(&library).map_err(|error| CudaError::OldNccl {
        found: error.to_string(),
    })?;
    // Its functions are used until the process ends.
    std::mem::forget(library);
    let mut version = 0;
    // SAFETY: writes one integer; a failure leaves zero, which is too old.
    unsafe { (functions.get_version)(&mut version) };
    if version < LOWEST_VERSION {
        return Err(CudaError::OldNccl {
            found: library::version_in_words(version),
        });
    }
    Ok(LIBRARY.get_or_init(|| functions))
}

impl NcclLibrary {
    /// 2.26.3 as 22603.
    pub fn version(&self) -> i32 {
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { (self.get_version)(&mut version) };
        version
    }

    /// 2.26.3.
    pub fn version_in_words(&self) -> String {
        library::version_in_words(self.version())
    }
}
