//! One pretend GPU for a test, through the bindings' safe layer.

use std::ffi::{CStr, CString};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaFunction, DriverError, sys};
use cudarc::nvrtc::{Ptx, sys as nvrtc};

use crate::cuda_emulator::{Emulator, Loaded, ORDERS, Order};

/// Headers that every program may include.
const HEADERS: [(&str, &str); 4] = [
    ("common.cuh", include_str!("../../../kernels/common.cuh")),
    ("half.cuh", include_str!("../../../kernels/half.cuh")),
    ("mma.cuh", include_str!("../../../kernels/mma.cuh")),
    ("random.cuh", include_str!("../../../kernels/random.cuh")),
];

/// The emulator, for one test at a time: its settings belong to the process.
pub struct Bench {
    pub emulator: &'static Loaded,
    _alone: MutexGuard<'static, ()>,
}

/// Starts a test with the settings given over the defaults. `None` without g++.
pub fn bench(settings: &[(&str, &str)]) -> Option<Bench> {
    static ALONE: Mutex<()> = Mutex::new(());
    let emulator = Emulator::build()?.load_here();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let defaults = [
        ("EMULATOR_DEVICES", "2"),
        ("EMULATOR_ARCH", "80"),
        ("EMULATOR_MEMORY", "1073741824"),
        ("EMULATOR_STREAMS", "late"),
        ("EMULATOR_PEERS", "1"),
        ("EMULATOR_QUIET", "1"),
        ("EMULATOR_NCCL_VERSION", "2.26.2"),
        ("EMULATOR_NCCL_MULTI_RANK", "0"),
        ("EMULATOR_SILENCE", "5"),
    ];
    let planned = std::env::var("EMULATOR_FAIL").unwrap_or_default();
    emulator.set("EMULATOR_FAIL", &planned);
    for (name, value) in defaults.iter().chain(settings) {
        emulator.set(name, value);
    }
    emulator.set_order(Order::Forward);
    emulator.reset_counters();
    Some(Bench {
        emulator,
        _alone: alone,
    })
}

impl Bench {
    /// A device without the bindings' own events, which would hide missing waits.
    pub fn device(&self, ordinal: usize) -> Arc<CudaContext> {
        let context = CudaContext::new(ordinal).unwrap();
        // SAFETY: the tests order their streams themselves, or show that it was forgotten.
        unsafe { context.disable_event_tracking() };
        context
    }

    /// Runs a test in every order of threads.
    pub fn in_all_orders<T>(&self, mut run: impl FnMut() -> T) -> Vec<T> {
        let results = ORDERS
            .iter()
            .map(|&order| {
                self.emulator.set_order(order);
                run()
            })
            .collect();
        self.emulator.set_order(Order::Forward);
        results
    }
}

/// What NVRTC makes of a source: the code, or its log.
pub fn compile(source: &str, architecture: &str) -> Result<Vec<u8>, String> {
    let text = |text: &str| CString::new(text).unwrap();
    let (source, name) = (text(source), text("program.cu"));
    let option = text(&format!("--gpu-architecture={architecture}"));
    let headers = HEADERS.map(|(_, header)| text(header));
    let names = HEADERS.map(|(name, _)| text(name));
    let (headers, names) = (headers.each_ref(), names.each_ref());
    let mut program = std::ptr::null_mut();
    // SAFETY: every string lives until the program is compiled; the results are fetched into rooms of
    // the sizes that were asked for.
    unsafe {
        let created = nvrtc::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            4,
            headers.map(|header| header.as_ptr()).as_ptr(),
            names.map(|name| name.as_ptr()).as_ptr(),
        );
        assert_eq!(created, nvrtc::nvrtcResult::NVRTC_SUCCESS);
        let compiled = nvrtc::nvrtcCompileProgram(program, 1, [option.as_ptr()].as_ptr());
        let mut bytes = 0;
        nvrtc::nvrtcGetProgramLogSize(program, &mut bytes);
        let mut log = vec![0u8; bytes];
        nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
        let result = if compiled == nvrtc::nvrtcResult::NVRTC_SUCCESS {
            let mut code = Vec::new();
            if architecture.starts_with("sm_") {
                nvrtc::nvrtcGetCUBINSize(program, &mut bytes);
                code.resize(bytes, 0);
                nvrtc::nvrtcGetCUBIN(program, code.as_mut_ptr().cast());
            } else {
                nvrtc::nvrtcGetPTXSize(program, &mut bytes);
                code.resize(bytes, 0);
                nvrtc::nvrtcGetPTX(program, code.as_mut_ptr().cast());
            }
            Ok(code)
        } else {
            let log = CStr::from_bytes_until_nul(&log).unwrap();
            Err(log.to_string_lossy().into_owned())
        };
        nvrtc::nvrtcDestroyProgram(&mut program);
        result
    }
}

/// A kernel of a source, loaded for the device's own architecture.
pub fn kernel(context: &Arc<CudaContext>, source: &str, name: &str) -> CudaFunction {
    let (major, minor) = context.compute_capability().unwrap();
    let code = compile(source, &format!("sm_{major}{minor}")).unwrap();
    let module = context.load_module(Ptx::from_binary(code)).unwrap();
    module.load_function(name).unwrap()
}

/// Asserts which error a driver call answered with.
#[track_caller]
pub fn assert_error<T>(answer: Result<T, DriverError>, expected: sys::CUresult) {
    match answer {
        Ok(_) => panic!("expected {expected:?}"),
        Err(error) => assert_eq!(error.0, expected),
    }
}

/// The bits of floats, to compare NaNs too.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Set for a child process, to the name of the one test that it runs.
const CHILD: &str = "CUDA_EMULATOR_BENCH_CHILD";

/// Runs a test's body in a process of its own, which ends after it: what hangs, hangs there. Returns what
/// it said on stderr; `None` without g++. Fails with the process, which has two minutes.
pub fn in_a_child(test: &str, variables: &[(&str, &str)], body: impl FnOnce()) -> Option<String> {
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        body();
        std::process::exit(0);
    }
    Emulator::build()?;
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("stderr");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, test)
        .envs(variables.iter().copied())
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(&said).unwrap())
        .spawn()
        .unwrap();
    let end = Instant::now() + Duration::from_secs(120);
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if Instant::now() > end => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    let said = std::fs::read_to_string(said).unwrap();
    let done = status.is_some_and(|status| status.success());
    assert!(done, "{test}: {status:?}\n{said}");
    Some(said)
}
