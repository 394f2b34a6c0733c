//! Compiled kernels on the device.

use std::ffi::CString;
use std::rc::Rc;

use cudarc::driver::{result, sys};

use super::cache::KernelCache;
use super::compile::{self, Target};
use super::device::{Device, Kernel};
use super::error::CudaError;
use super::source::Sources;
use crate::backend::{BackendError, Work};

type Result<T> = std::result::Result<T, BackendError>;

/// All modules of the sources, loaded.
pub(super) struct Modules {
    device: Rc<Device>,
    modules: Vec<(&'static str, sys::CUmodule)>,
}

impl Modules {
    /// Compiles what the cache does not hold, and loads everything.
    ///
    /// # Errors
    /// A source does not compile, or the device does not take the code.
    pub fn load(device: &Rc<Device>) -> Result<Self> {
        let sources = Sources::read().map_err(BackendError::Cuda)?;
        let target = Target::of(device.capability()).map_err(BackendError::Cuda)?;
        let cache = KernelCache::open();
        let mut modules = Modules {
            device: Rc::clone(device),
            modules: Vec::with_capacity(sources.modules.len()),
        };
        for file in &sources.modules {
            let make = || Ok(compile::compile(file, &sources, target, &[])?.code);
            let mut code = cache
                .get(file, &sources, target, make)
                .map_err(BackendError::Cuda)?;
            // PTX is text: the driver reads up to a zero.
            code.push(0);
            // SAFETY: the image is complete: the compiler made it, or its checksum was right.
            let module = unsafe { result::module::load_data(code.as_ptr().cast()) };
            let module = device.check("cuModuleLoadData", module)?;
            modules.modules.push((file.name, module));
            device.pulse().beat();
        }
        Ok(modules)
    }

    /// A kernel of a file that uses at most 48 KiB of shared memory.
    ///
    /// # Errors
    /// The file has no such kernel.
    pub fn kernel(&self, file: &str, name: &'static str) -> Result<Kernel> {
        let found = self.modules.iter().find(|(module, _)| *module == file);
        let (Some((_, module)), Ok(symbol)) = (found, CString::new(name)) else {
            return Err(BackendError::Cuda(CudaError::Call {
                ordinal: self.device.ordinal(),
                call: name,
                reason: format!("there is no kernels/{file} in this build"),
            }));
        };
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(*module, symbol) };
        Ok(Kernel {
            function: self.device.check(name, function)?,
            name,
            work: work_of(file, name),
        })
    }

    /// A kernel that may use up to `bytes` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// The file has no such kernel, or the device has less shared memory.
    pub fn kernel_with_shared(&self, file: &str, name: &'static str, bytes: u32) -> Result<Kernel> {
        let kernel = self.kernel(file, name)?;
        use sys::CUfunction_attribute_enum as Attribute;
        let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function belongs to a loaded module.
        let set = unsafe {
            result::function::set_function_attribute(kernel.function, most, bytes as i32)
        };
        self.device.check(name, set)?;
        Ok(kernel)
    }
}

/// What a kernel counts as.
fn work_of(file: &str, name: &str) -> Work {
    match (file, name) {
        (_, "store_key_value_by_8" | "store_key_value_by_1") => Work::Elementwise,
        // Of the losses of a micro-batch.
        ("loss.cu", _) | (_, "sum" | "sum_pieces") => Work::Loss,
        ("attention_forward.cu" | "attention_backward.cu", _) => Work::Attention,
        ("adapter.cu", _) => Work::Products,
        ("optim.cu", _) => Work::Optimizer,
        _ => Work::Elementwise,
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        // Kernels may be under way; errors here are seen by the next call that matters.
        if self.device.synchronize().is_err() && self.device.pulse().is_stopped() {
            // Unloading waits for the GPU, and this one may never answer.
            return;
        }
        for (_, module) in &self.modules {
            // SAFETY: loaded by `load`; nobody launches from it any more.
            let _ = unsafe { result::module::unload(*module) };
        }
    }
}
