//! Kernels from source to machine code by NVRTC, for exactly the GPU at hand.

use std::ffi::{CStr, CString, c_char};

use cudarc::nvrtc::sys;

use super::error::CudaError;
use super::library;
use super::source::{SourceFile, Sources};
use super::survey::LOWEST_CAPABILITY;

/// What machine code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Machine code for one architecture: `sm_86`.
    Cubin(u32),
    /// PTX that the driver translates further: `compute_80`, for a GPU newer than NVRTC, or to run
    /// the code path of an older architecture on a newer card.
    Ptx(u32),
}

/// Runs the code path of an older architecture, as in `75`: PTX for it.
pub(super) const ARCH_VARIABLE: &str = "MP_TRAIN_KERNEL_ARCH";

impl Target {
    /// The older architecture that was asked for, or else the best that this NVRTC can do for a device
    /// of that capability.
    ///
    /// # Errors
    /// What was asked for is no architecture that this NVRTC knows and the device runs.
    pub fn of(capability: u32) -> Result<Self, CudaError> {
        let known: Vec<u32> = supported()
            .into_iter()
            .filter(|arch| (LOWEST_CAPABILITY..=capability).contains(arch))
            .collect();
        if let Ok(asked) = std::env::var(ARCH_VARIABLE) {
            let arch = asked.parse().ok().filter(|arch| known.contains(arch));
            return arch.map(Target::Ptx).ok_or(CudaError::Architecture {
                found: asked,
                known,
            });
        }
        if known.contains(&capability) {
            return Ok(Target::Cubin(capability));
        }
        let newest = known.into_iter().max();
        Ok(Target::Ptx(newest.unwrap_or(capability)))
    }

    /// NVRTC's name of it.
    pub fn name(self) -> String {
        match self {
            Target::Cubin(arch) => format!("sm_{arch}"),
            Target::Ptx(arch) => format!("compute_{arch}"),
        }
    }
}

/// Architectures that the NVRTC at hand knows.
fn supported() -> Vec<u32> {
    let mut count = 0;
    // SAFETY: writes one integer.
    if unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) } != sys::nvrtcResult::NVRTC_SUCCESS {
        return Vec::new();
    }
    let mut archs = vec![0; count.max(0) as usize];
    // SAFETY: writes as many integers as were counted.
    if unsafe { sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()) } != sys::nvrtcResult::NVRTC_SUCCESS
    {
        return Vec::new();
    }
    archs.into_iter().map(|arch| arch as u32).collect()
}

/// What changes the code beside source and target.
pub(super) const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=true", "-lineinfo"];

/// A program of NVRTC's, destroyed with it.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram, destroyed once.
        let _ = unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

/// What the compiler made of one source file.
pub struct Compiled {
    /// As in `norm.cu`.
    pub file: &'static str,
    /// Machine code or PTX.
    pub code: Vec<u8>,
    /// The compiler's messages; with `--ptxas-options=-v` registers and spills of every kernel.
    pub log: String,
}

/// Compiles every kernel for one architecture (`86`), with options beside those of a run. Needs NVRTC,
/// but neither driver nor GPU.
///
/// # Errors
/// NVRTC is missing, or a kernel does not compile.
pub fn compile_kernels(arch: u32, options: &[&str]) -> Result<Vec<Compiled>, CudaError> {
    library::open_nvrtc()?;
    let sources = Sources::read()?;
    let files = sources.modules.iter();
    files
        .map(|file| compile(file, &sources, Target::Cubin(arch), options))
        .collect()
}

/// Version of NVRTC and the architectures it compiles for.
///
/// # Errors
/// NVRTC is missing.
pub fn nvrtc() -> Result<((i32, i32), Vec<u32>), CudaError> {
    library::open_nvrtc()?;
    Ok((library::nvrtc_version(), supported()))
}

/// Machine code of one source file.
///
/// # Errors
/// The compiler refuses it; its messages are in the error.
pub(super) fn compile(
    file: &SourceFile,
    sources: &Sources,
    target: Target,
    more_options: &[&str],
) -> Result<Compiled, CudaError> {
    let refuse = |log: String| CudaError::Compile {
        file: file.name.to_owned(),
        arch: target.name(),
        log,
    };
    let text = |text: &str| {
        CString::new(text).map_err(|_| refuse("the source holds a zero byte".to_owned()))
    };
    let (source, name) = (text(&file.text)?, text(file.name)?);
    let mut headers = Vec::with_capacity(sources.headers.len());
    let mut names = Vec::with_capacity(sources.headers.len());
    for header in &sources.headers {
        headers.push(text(&header.text)?);
        names.push(text(header.name)?);
    }
    let pointers = |texts: &[CString]| texts.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
    let (header_pointers, name_pointers) = (pointers(&headers), pointers(&names));
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all strings are zero-terminated and live until the program has been compiled.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &mut program.0,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            header_pointers.as_ptr(),
            name_pointers.as_ptr(),
        )
    };
    if created != sys::nvrtcResult::NVRTC_SUCCESS {
        return Err(refuse(reason(created)));
    }
    let mut options = vec![text(&format!("--gpu-architecture={}", target.name()))?];
    for option in OPTIONS.iter().chain(more_options) {
        options.push(text(option)?);
    }
    let option_pointers = pointers(&options);
    // SAFETY: the program is alive; the options live during the call.
    let compiled = unsafe {
        sys::nvrtcCompileProgram(program.0, options.len() as i32, option_pointers.as_ptr())
    };
    let log = fetch(
        &program,
        sys::nvrtcGetProgramLogSize,
        sys::nvrtcGetProgramLog,
    )
    .unwrap_or_else(reason_bytes);
    let log = CStr::from_bytes_until_nul(&log).map(|log| log.to_string_lossy().into_owned());
    let log = log.unwrap_or_default();
    if compiled != sys::nvrtcResult::NVRTC_SUCCESS {
        return Err(refuse(format!("{}\n{log}", reason(compiled))));
    }
    let code = match target {
        Target::Cubin(_) => fetch(&program, sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
        Target::Ptx(_) => fetch(&program, sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
    };
    Ok(Compiled {
        file: file.name,
        code: code.map_err(|code| refuse(reason(code)))?,
        log,
    })
}

fn reason(code: sys::nvrtcResult) -> String {
    // SAFETY: returns a constant zero-terminated text for every code.
    let text = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(code)) };
    text.to_string_lossy().into_owned()
}

fn reason_bytes(code: sys::nvrtcResult) -> Vec<u8> {
    let mut bytes = reason(code).into_bytes();
    bytes.push(0);
    bytes
}

type SizeOf = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type CopyOf = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

/// One of a program's results: its size, then its bytes.
fn fetch(program: &Program, size_of: SizeOf, copy: CopyOf) -> Result<Vec<u8>, sys::nvrtcResult> {
    let mut size = 0;
    // SAFETY: the program is alive; writes one integer.
    match unsafe { size_of(program.0, &mut size) } {
        sys::nvrtcResult::NVRTC_SUCCESS => {}
        code => return Err(code),
    }
    let mut bytes = vec![0u8; size];
    // SAFETY: writes as many bytes as it said.
    match unsafe { copy(program.0, bytes.as_mut_ptr().cast()) } {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(bytes),
        code => Err(code),
    }
}
