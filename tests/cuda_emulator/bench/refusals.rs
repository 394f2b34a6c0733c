//! What a GPU refuses.

use cudarc::driver::sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaFunction, CudaStream, DriverError, LaunchConfig, PushKernelArg, result};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;

use crate::gpu::{assert_error, bench, compile, kernel};

const KERNELS: &str = r#"
#include "common.cuh"
KERNEL __launch_bounds__(512) bounded(float* out) { DYNAMIC_SHARED(float, x); x[threadIdx.x] = 0; out[0] = 0; }
KERNEL unbounded(float* out) { out[0] = 0; }
KERNEL __launch_bounds__(32) with_static(float* out) { __shared__ float x[1024]; x[threadIdx.x] = 0; out[0] = x[threadIdx.x]; }
"#;

const ONE_THREAD: LaunchConfig = LaunchConfig {
    grid_dim: (1, 1, 1),
    block_dim: (1, 1, 1),
    shared_mem_bytes: 0,
};

fn launch(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    grid: (u32, u32, u32),
    block: (u32, u32, u32),
    shared: u32,
) -> Result<(), DriverError> {
    let mut out = stream.alloc_zeros::<f32>(1)?;
    let mut builder = stream.launch_builder(function);
    builder.arg(&mut out);
    let geometry = LaunchConfig {
        grid_dim: grid,
        block_dim: block,
        shared_mem_bytes: shared,
    };
    // SAFETY: the arguments are those of the kernel, or the driver refuses the launch.
    unsafe { builder.launch(geometry) }.map(|_| ())
}

#[test]
fn shared_memory_beyond_what_was_asked_for_or_there_is() {
    for (architecture, most) in [
        ("75", 65_536),
        ("80", 166_912),
        ("86", 101_376),
        ("90", 232_448),
    ] {
        let Some(bench) = bench(&[("EMULATOR_ARCH", architecture)]) else {
            return;
        };
        let context = bench.device(0);
        let (stream, bounded) = (
            context.default_stream(),
            kernel(&context, KERNELS, "bounded"),
        );
        let try_launch = |shared| launch(&stream, &bounded, (1, 1, 1), (32, 1, 1), shared);
        let raise =
            |bytes| bounded.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes);
        try_launch(49_152).unwrap();
        assert_error(try_launch(49_156), CUresult::CUDA_ERROR_INVALID_VALUE);
        assert_error(raise(most + 1), CUresult::CUDA_ERROR_INVALID_VALUE);
        raise(most).unwrap();
        try_launch(most as u32).unwrap();
        assert_error(
            try_launch(most as u32 + 4),
            CUresult::CUDA_ERROR_INVALID_VALUE,
        );
        stream.synchronize().unwrap();
    }
}

#[test]
fn static_shared_memory_counts() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let (stream, function) = (
        context.default_stream(),
        kernel(&context, KERNELS, "with_static"),
    );
    let try_launch = |shared| launch(&stream, &function, (1, 1, 1), (32, 1, 1), shared);
    try_launch(49_152 - 4096).unwrap();
    assert_error(
        try_launch(49_152 - 4092),
        CUresult::CUDA_ERROR_INVALID_VALUE,
    );
}

#[test]
fn blocks_and_grids_beyond_their_limits() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let stream = context.default_stream();
    let (bounded, unbounded) = (
        kernel(&context, KERNELS, "bounded"),
        kernel(&context, KERNELS, "unbounded"),
    );
    use CUresult::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES};
    launch(&stream, &bounded, (1, 1, 1), (512, 1, 1), 4096).unwrap();
    launch(&stream, &unbounded, (1, 1, 1), (256, 1, 1), 0).unwrap();
    // Without bounds a thread may hold 255 registers.
    let answer = launch(&stream, &unbounded, (1, 1, 1), (288, 1, 1), 0);
    assert_error(answer, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
    for (grid, block) in [
        ((1, 1, 1), (513, 1, 1)),
        ((1, 1, 1), (1025, 1, 1)),
        ((1, 1, 1), (1, 1, 65)),
        ((0, 1, 1), (32, 1, 1)),
        ((1, 65_536, 1), (32, 1, 1)),
        ((1, 1, 65_536), (32, 1, 1)),
    ] {
        let answer = launch(&stream, &bounded, grid, block, 0);
        assert_error(answer, CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn copies_and_fills_outside_of_an_allocation() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    context.bind_to_thread().unwrap();
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    // SAFETY: the driver refuses what is wrong below; the rest keeps to the allocation.
    unsafe {
        let at = result::malloc_sync(100).unwrap();
        let wrong = CUresult::CUDA_ERROR_INVALID_VALUE;
        let mut bytes = [0u8; 64];
        assert_error(result::memcpy_htod_async(at + 40, &bytes, stream), wrong);
        assert_error(
            result::memcpy_dtoh_async(&mut bytes, at + 40, stream),
            wrong,
        );
        assert_error(result::memcpy_dtod_async(at, at + 10, 20, stream), wrong);
        assert_error(result::memset_d8_async(at, 0, 101, stream), wrong);
        result::memset_d8_async(at, 0, 100, stream).unwrap();
        result::free_sync(at).unwrap();
        assert_error(result::free_sync(at), wrong);
        assert_error(result::memset_d8_async(at, 0, 1, stream), wrong);
        result::stream::destroy(stream).unwrap();
    }
}

#[test]
fn more_memory_than_there_is() {
    let Some(bench) = bench(&[("EMULATOR_MEMORY", "1000000")]) else {
        return;
    };
    let context = bench.device(0);
    context.bind_to_thread().unwrap();
    assert_eq!(result::mem_get_info().unwrap(), (1_000_000, 1_000_000));
    // SAFETY: freed below.
    unsafe {
        let at = result::malloc_sync(600_000).unwrap();
        assert_error(
            result::malloc_sync(600_000),
            CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        );
        assert!(result::mem_get_info().unwrap().0 < 400_000);
        result::free_sync(at).unwrap();
        result::free_sync(result::malloc_sync(600_000).unwrap()).unwrap();
    }
}

#[test]
fn code_for_another_device() {
    let Some(bench) = bench(&[("EMULATOR_ARCH", "86")]) else {
        return;
    };
    let context = bench.device(0);
    for (target, expected) in [
        ("sm_80", None),
        ("sm_86", None),
        ("sm_75", Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)),
        ("sm_89", Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)),
        ("sm_90", Some(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU)),
        ("compute_75", None),
        ("compute_90", Some(CUresult::CUDA_ERROR_INVALID_PTX)),
    ] {
        let code = compile(KERNELS, target).unwrap();
        let answer = context.load_module(Ptx::from_binary(code)).map(|_| ());
        assert_eq!(answer.err().map(|error| error.0), expected, "{target}");
    }
    let answer = context.load_module(Ptx::from_binary(vec![7; 64]));
    assert_error(answer, CUresult::CUDA_ERROR_INVALID_IMAGE);
}

#[test]
fn a_pointer_that_no_device_knows() {
    let Some(bench) = bench(&[]) else { return };
    for (peers, expected) in [(false, true), (true, false)] {
        let (context, other) = (bench.device(0), bench.device(1));
        let (stream, far) = (context.default_stream(), other.default_stream());
        let function = kernel(&context, KERNELS, "unbounded");
        if peers {
            context.bind_to_thread().unwrap();
            // SAFETY: the context is alive.
            unsafe { cudarc::driver::sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0) }
                .result()
                .unwrap();
        }
        let mut out = far.alloc_zeros::<f32>(1).unwrap();
        far.synchronize().unwrap();
        let mut builder = stream.launch_builder(&function);
        builder.arg(&mut out);
        // SAFETY: the arguments are those of the kernel.
        unsafe { builder.launch(ONE_THREAD) }.unwrap();
        // The error sticks: every later call of the context answers with it.
        for _ in 0..2 {
            let answer = stream.synchronize();
            assert_eq!(answer.is_err(), expected);
            if expected {
                assert_error(answer, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
            }
        }
        assert_eq!(stream.alloc_zeros::<f32>(1).is_err(), expected);
    }
}

/// Set for a child process of the test below.
const CHILD: &str = "CUDA_EMULATOR_BENCH_CHILD";

#[test]
fn failures_can_be_planned_and_calls_traced() {
    if std::env::var_os(CHILD).is_some() {
        let Some(bench) = bench(&[]) else { return };
        let context = bench.device(0);
        let (stream, function) = (
            context.default_stream(),
            kernel(&context, KERNELS, "unbounded"),
        );
        let try_launch = || launch(&stream, &function, (1, 1, 1), (32, 1, 1), 0);
        try_launch().unwrap();
        assert_error(
            stream.alloc_zeros::<f32>(1),
            CUresult::CUDA_ERROR_OUT_OF_MEMORY,
        );
        stream.synchronize().unwrap();
        try_launch().unwrap();
        assert_error(stream.synchronize(), CUresult::CUDA_ERROR_LAUNCH_FAILED);
        return;
    }
    if crate::cuda_emulator::Emulator::build().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let [trace, report] = ["trace.jsonl", "report.json"].map(|name| folder.path().join(name));
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["failures_can_be_planned_and_calls_traced", "--nocapture"])
        .env(CHILD, "1")
        .env("EMULATOR_FAIL", "allocation:2,launch:unbounded:2")
        .env("EMULATOR_TRACE", &trace)
        .env("EMULATOR_REPORT", &report)
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap();
    let events: Vec<serde_json::Value> = read(&trace)
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let number = |event: &str| events.iter().filter(|e| e["event"] == event).count();
    assert_eq!((number("launch"), number("out_of_memory")), (2, 1));
    assert!(number("synchronise") >= 2);
    let report: serde_json::Value = serde_json::from_str(&read(&report)).unwrap();
    assert_eq!(report["launch:unbounded"], 2);
    assert_eq!(report["allocations"], 2);
}
