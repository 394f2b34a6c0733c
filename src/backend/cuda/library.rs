//! The CUDA libraries: found before anything else of CUDA is called, because a missing one would end
//! the process inside the bindings.

use std::path::PathBuf;
use std::sync::OnceLock;

use cudarc::{cublaslt, driver, nvrtc};

use super::error::CudaError;

/// A library beside the driver.
pub(super) struct Wanted {
    /// Start of its file name, for the search.
    pub stem: &'static str,
    /// For messages.
    pub file: &'static str,
    /// The wheel that holds it.
    pub wheel: &'static str,
    /// Whether the loader finds it by name.
    pub present: fn() -> bool,
}

const NVRTC: Wanted = Wanted {
    stem: "libnvrtc",
    file: "libnvrtc.so.12",
    wheel: "nvidia-cuda-nvrtc-cu12",
    // SAFETY: loads the library and closes it again; NVRTC has no initialiser that does harm.
    present: || unsafe { nvrtc::sys::is_culib_present() },
};

const CUBLASLT: Wanted = Wanted {
    stem: "libcublasLt",
    file: "libcublasLt.so.12",
    wheel: "nvidia-cublas-cu12",
    // SAFETY: as above, for cuBLASLt.
    present: || unsafe { cublaslt::sys::is_culib_present() },
};

impl Wanted {
    /// Finds the library where the loader looks, or else in the folders of wheels and toolkits.
    pub fn open(&self) -> Result<(), CudaError> {
        if (self.present)() || (load_from_folders(self.stem) && (self.present)()) {
            return Ok(());
        }
        Err(CudaError::NoLibrary {
            library: self.file,
            wheel: self.wheel,
        })
    }
}

/// Opens NVRTC alone, for which no driver is needed.
///
/// # Errors
/// It is missing.
pub(super) fn open_nvrtc() -> Result<(), CudaError> {
    NVRTC.open()
}

/// Lowest `cuDriverGetVersion` that runs what NVRTC 12 compiles: CUDA 12.0.
const DRIVER_NEEDED: i32 = 12_000;

/// Opens driver and libraries, once for the process.
///
/// # Errors
/// One of them is missing, or the driver is too old or does not start.
pub(super) fn open() -> Result<(), CudaError> {
    static READY: OnceLock<()> = OnceLock::new();
    if READY.get().is_some() {
        return Ok(());
    }
    open_driver()?;
    for wanted in [&NVRTC, &CUBLASLT] {
        wanted.open()?;
    }
    let (nvrtc, _) = nvrtc_version();
    let driver = driver_version()?;
    if driver / 1000 < nvrtc {
        return Err(CudaError::OldDriver {
            found: driver,
            needed: nvrtc * 1000,
            what: "the NVRTC library that was found",
            driver: if nvrtc >= 13 { "580" } else { "525" },
        });
    }
    READY.get_or_init(|| ());
    Ok(())
}

/// Opens the driver alone.
///
/// # Errors
/// It is missing, too old, or does not start.
pub(super) fn open_driver() -> Result<(), CudaError> {
    // SAFETY: loads libcuda and closes it again.
    if !unsafe { driver::sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    // Before cuInit: asking for the version works with any driver.
    let found = driver_version()?;
    if found < DRIVER_NEEDED {
        return Err(CudaError::OldDriver {
            found,
            needed: DRIVER_NEEDED,
            what: "mp-train",
            driver: "525",
        });
    }
    driver::result::init().map_err(|error| match error.0 {
        driver::sys::CUresult::CUDA_ERROR_NO_DEVICE => CudaError::NoDevice,
        _ => CudaError::Call {
            ordinal: 0,
            call: "cuInit",
            reason: super::device::driver_reason(error),
        },
    })
}

/// `cuDriverGetVersion`: 12080 for CUDA 12.8.
pub(super) fn driver_version() -> Result<i32, CudaError> {
    let mut version = 0;
    // SAFETY: writes one integer; needs no initialisation.
    unsafe { driver::sys::cuDriverGetVersion(&mut version) }
        .result()
        .map_err(|error| CudaError::Call {
            ordinal: 0,
            call: "cuDriverGetVersion",
            reason: super::device::driver_reason(error),
        })?;
    Ok(version)
}

/// Version of NVRTC. The library must have been opened.
pub(super) fn nvrtc_version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers. A failure leaves zeros, which no check takes for a version.
    unsafe { nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    (major, minor)
}

/// Version of cuBLASLt, as in 120800. The library must have been opened.
pub(super) fn cublaslt_version() -> usize {
    // SAFETY: takes and changes nothing.
    unsafe { cublaslt::sys::cublasLtGetVersion() }
}

/// NCCL's number of a version, as in 22603, in words.
pub(super) fn version_in_words(version: i32) -> String {
    format!(
        "{}.{}.{}",
        version / 10_000,
        version / 100 % 100,
        version % 100
    )
}

/// Loads `stem*.so*` by absolute path from a folder where wheels and toolkits put it, for good: the
/// loader then finds it under its own name. Whether anything was loaded.
fn load_from_folders(stem: &str) -> bool {
    for folder in folders() {
        // NVRTC opens its builtins by name; they must be there before.
        let mut files: Vec<PathBuf> = match std::fs::read_dir(&folder) {
            Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
            Err(_) => continue,
        };
        files.retain(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| {
                name.starts_with(stem) && name.contains(".so") && !name.contains(".alt.")
            })
        });
        files.sort_by_key(|path| !path.to_string_lossy().contains("builtins"));
        let mut loaded = false;
        for file in files {
            // SAFETY: the folder is one of NVIDIA's packages or named by the user; its libraries
            // have no initialiser that does harm.
            if let Ok(library) = unsafe { libloading::Library::new(&file) } {
                std::mem::forget(library);
                loaded = true;
            }
        }
        if loaded {
            return true;
        }
    }
    false
}

/// Folders that may hold the libraries of wheels or of a toolkit.
fn folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    if let Some(given) = std::env::var_os("MP_TRAIN_CUDA_LIBRARIES") {
        folders.extend(std::env::split_paths(&given));
    }
    let mut roots: Vec<String> = ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .collect();
    if let Ok(home) = std::env::var("HOME") {
        roots.push(format!("{home}/.local"));
    }
    roots.extend(["/usr/local".to_owned(), "/usr".to_owned()]);
    let mut patterns = Vec::new();
    for root in roots {
        let root = glob::Pattern::escape(&root);
        for packages in ["site-packages", "dist-packages"] {
            patterns.push(format!("{root}/lib/python3*/{packages}/nvidia/*/lib"));
        }
    }
    patterns.push("/usr/local/cuda*/lib64".to_owned());
    for pattern in patterns {
        folders.extend(glob::glob(&pattern).into_iter().flatten().flatten());
    }
    folders
}
