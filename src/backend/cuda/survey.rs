//! What GPUs there are, without using any.

use cudarc::driver::result::{self, DriverError, device as cu_device, primary_ctx};
use cudarc::driver::sys;

use super::compile::Target;
use super::device::driver_reason;
use super::error::CudaError;
use super::library;

/// One GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuInfo {
    /// CUDA's number.
    pub ordinal: u32,
    /// As the driver calls it.
    pub name: String,
    /// Compute capability times ten: 86.
    pub capability: u32,
    /// Bytes of memory, all of it.
    pub total_memory: u64,
    /// Bytes of memory that nobody uses now.
    pub free_memory: u64,
    /// GPUs whose memory it can reach directly.
    pub peers: Vec<u32>,
    /// What kernels are compiled for: `sm_86`; nothing where the GPU is too old.
    pub kernels: Option<String>,
}

/// Driver, libraries and GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// CUDA version that the driver supports: (12, 8).
    pub driver: (i32, i32),
    /// Version of NVRTC.
    pub nvrtc: (i32, i32),
    /// Version of cuBLASLt: (12, 8, 4).
    pub cublaslt: (usize, usize, usize),
    /// The GPUs.
    pub gpus: Vec<GpuInfo>,
}

/// Lowest compute capability, times ten, that the kernels run on: Turing.
pub(super) const LOWEST_CAPABILITY: u32 = 75;

fn call(ordinal: u32, call: &'static str) -> impl Fn(DriverError) -> CudaError {
    move |error| CudaError::Call {
        ordinal,
        call,
        reason: driver_reason(error),
    }
}

fn count() -> Result<u32, CudaError> {
    match cu_device::get_count() {
        Ok(count) => Ok(count.max(0) as u32),
        Err(error) if error.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(call(0, "cuDeviceGetCount")(error)),
    }
}

/// Refuses devices that are not there or too old, before anything is read or loaded.
///
/// # Errors
/// Driver or libraries are missing or too old, there is no such GPU, or it cannot run the kernels.
pub fn check(ordinals: impl IntoIterator<Item = u32>) -> Result<(), CudaError> {
    library::open()?;
    let count = count()?;
    if count == 0 {
        return Err(CudaError::NoDevice);
    }
    for ordinal in ordinals {
        if ordinal >= count {
            return Err(CudaError::NoSuchDevice {
                ordinal,
                count: count as usize,
            });
        }
        let device = cu_device::get(ordinal as i32).map_err(call(ordinal, "cuDeviceGet"))?;
        let capability = capability(ordinal, device)?;
        if capability < LOWEST_CAPABILITY {
            return Err(CudaError::OldDevice {
                ordinal,
                name: cu_device::get_name(device).map_err(call(ordinal, "cuDeviceGetName"))?,
                major: capability / 10,
                minor: capability % 10,
            });
        }
    }
    Ok(())
}

/// Ordinals of the GPUs that can be used; none on a machine without driver or GPU.
///
/// # Errors
/// There are GPUs, but driver or libraries are missing or too old.
pub fn visible() -> Result<Vec<u32>, CudaError> {
    match library::open_driver() {
        Ok(()) => {}
        Err(CudaError::NoDriver | CudaError::NoDevice) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    }
    let count = count()?;
    if count == 0 {
        return Ok(Vec::new());
    }
    library::open()?;
    let mut usable = Vec::new();
    for ordinal in 0..count {
        let device = cu_device::get(ordinal as i32).map_err(call(ordinal, "cuDeviceGet"))?;
        if capability(ordinal, device)? >= LOWEST_CAPABILITY {
            usable.push(ordinal);
        }
    }
    Ok(usable)
}

/// Everything there is to say about the GPUs of this machine.
///
/// # Errors
/// Driver or libraries are missing or too old, or a call fails.
pub fn survey() -> Result<Survey, CudaError> {
    library::open()?;
    let version = library::driver_version()?;
    let cublaslt = library::cublaslt_version();
    let count = count()?;
    let gpus = (0..count).map(|ordinal| gpu(ordinal, count));
    Ok(Survey {
        driver: (version / 1000, version % 1000 / 10),
        nvrtc: library::nvrtc_version(),
        // 120804 is 12.8.4.
        cublaslt: (cublaslt / 10_000, cublaslt / 100 % 100, cublaslt % 100),
        gpus: gpus.collect::<Result<_, _>>()?,
    })
}

/// Bytes of a GPU's memory that nobody uses now, and its compute capability times ten.
///
/// # Errors
/// As [`check`], or the GPU cannot be asked.
pub fn free_memory(ordinal: u32) -> Result<(u64, u32), CudaError> {
    check([ordinal])?;
    let device = cu_device::get(ordinal as i32).map_err(call(ordinal, "cuDeviceGet"))?;
    let (free, _) = memory(ordinal, device)?;
    Ok((free as u64, capability(ordinal, device)?))
}

fn gpu(ordinal: u32, count: u32) -> Result<GpuInfo, CudaError> {
    let device = cu_device::get(ordinal as i32).map_err(call(ordinal, "cuDeviceGet"))?;
    let capability = capability(ordinal, device)?;
    let mut peers = Vec::new();
    for peer in (0..count).filter(|&peer| peer != ordinal) {
        let other = cu_device::get(peer as i32).map_err(call(peer, "cuDeviceGet"))?;
        let mut can = 0;
        // SAFETY: both devices were returned by the driver; writes one integer.
        unsafe { sys::cuDeviceCanAccessPeer(&mut can, device, other) }
            .result()
            .map_err(call(ordinal, "cuDeviceCanAccessPeer"))?;
        if can != 0 {
            peers.push(peer);
        }
    }
    let (free, total) = memory(ordinal, device)?;
    Ok(GpuInfo {
        ordinal,
        name: cu_device::get_name(device).map_err(call(ordinal, "cuDeviceGetName"))?,
        capability,
        total_memory: total as u64,
        free_memory: free as u64,
        peers,
        kernels: match capability >= LOWEST_CAPABILITY {
            true => Some(Target::of(capability)?.name()),
            false => None,
        },
    })
}

/// Compute capability times ten.
pub(super) fn capability(ordinal: u32, device: sys::CUdevice) -> Result<u32, CudaError> {
    use sys::CUdevice_attribute as Attribute;
    let attribute = |attribute| {
        // SAFETY: `device` was returned by the driver.
        unsafe { cu_device::get_attribute(device, attribute) }
            .map_err(call(ordinal, "cuDeviceGetAttribute"))
    };
    let major = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok((major * 10 + minor) as u32)
}

/// Free and total bytes. Opens the device for a moment, as only an open one can be asked.
fn memory(ordinal: u32, device: sys::CUdevice) -> Result<(usize, usize), CudaError> {
    let before = result::ctx::get_current().map_err(call(ordinal, "cuCtxGetCurrent"))?;
    // SAFETY: `device` was returned by the driver; released below.
    let context = unsafe { primary_ctx::retain(device) }
        .map_err(call(ordinal, "cuDevicePrimaryCtxRetain"))?;
    // SAFETY: the context was just retained; what was current before is put back.
    let asked = unsafe { result::ctx::set_current(context) }.and_then(|()| result::mem_get_info());
    // SAFETY: `before` was current a moment ago, or no context becomes current; the retained context
    // is released once.
    let back = unsafe {
        let back = result::ctx::set_current(before.unwrap_or(std::ptr::null_mut()));
        back.and(primary_ctx::release(device))
    };
    let memory = asked.map_err(call(ordinal, "cuMemGetInfo"))?;
    back.map_err(call(ordinal, "cuCtxSetCurrent"))?;
    Ok(memory)
}
