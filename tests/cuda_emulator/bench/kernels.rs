//! Kernels: right ones give the same bits in every order and on every architecture, wrong ones are
//! found.

use cudarc::driver::sys::CUresult::CUDA_ERROR_LAUNCH_FAILED;
use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PushKernelArg};
use half::f16;

use crate::gpu::{bench, bits, compile, kernel};

/// Sums of `n` values by block, through shared memory, and what is left over.
const SUMS: &str = r#"
#include "common.cuh"
KERNEL __launch_bounds__(128) sums(float* __restrict__ out, const float* __restrict__ x, u32 n) {
    __shared__ float room[4];
    float sum = 0.0f;
    for (u64 i = grid_first(); i < n; i += grid_step()) sum += x[i];
    sum = block_sum(sum, room);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
"#;

#[test]
fn sums_repeat_in_every_order_and_on_every_architecture() {
    let Some(bench) = bench(&[]) else { return };
    let values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin()).collect();
    let mut results = Vec::new();
    for architecture in ["75", "80", "86", "89", "90", "100", "120"] {
        bench.emulator.set("EMULATOR_ARCH", architecture);
        let context = bench.device(0);
        let (stream, sums) = (context.default_stream(), kernel(&context, SUMS, "sums"));
        results.extend(bench.in_all_orders(|| {
            let x = stream.clone_htod(&values).unwrap();
            let mut out = stream.alloc_zeros::<f32>(3).unwrap();
            let mut launch = stream.launch_builder(&sums);
            launch.arg(&mut out).arg(&x).arg(&1000u32);
            // SAFETY: the arguments are those of the kernel.
            unsafe { launch.launch(geometry(3, 128, 0)) }.unwrap();
            bits(&stream.clone_dtoh(&out).unwrap())
        }));
    }
    assert!(results.iter().all(|result| *result == results[0]));
    let exact: f64 = values.iter().map(|&value| f64::from(value)).sum();
    let sum: f32 = results[0].iter().map(|&word| f32::from_bits(word)).sum();
    assert!((f64::from(sum) - exact).abs() < 1e-4);
}

#[test]
fn compiler_errors_are_in_the_log() {
    let Some(_bench) = bench(&[]) else { return };
    let wrong = "#include \"common.cuh\"\nKERNEL broken(float* out) { out[0] = missing; }\n";
    let log = compile(wrong, "sm_80").unwrap_err();
    assert!(
        log.contains("program.cu:2") && log.contains("missing"),
        "{log}"
    );
    let log = compile(wrong, "sm_33").unwrap_err();
    assert!(log.contains("--gpu-architecture"), "{log}");
}

#[test]
fn ptx_of_an_older_architecture_runs_its_code_path() {
    let Some(bench) = bench(&[("EMULATOR_ARCH", "90")]) else {
        return;
    };
    let source = "#include \"common.cuh\"\nKERNEL arch(u32* out) { out[0] = __CUDA_ARCH__; }\n";
    let context = bench.device(0);
    let stream = context.default_stream();
    for (target, expected) in [("sm_90", 900), ("compute_75", 750), ("compute_80", 800)] {
        let code = compile(source, target).unwrap();
        let image = cudarc::nvrtc::Ptx::from_binary(code);
        let function = context
            .load_module(image)
            .unwrap()
            .load_function("arch")
            .unwrap();
        let mut out = stream.alloc_zeros::<u32>(1).unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&mut out);
        // SAFETY: the arguments are those of the kernel.
        unsafe { launch.launch(geometry(1, 1, 0)) }.unwrap();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), [expected]);
    }
}

/// A product of half matrices on tensor cores, [16, 16] by [16, 8], with the operands through shared
/// memory: `wait` may be left out.
fn tile_product(wait: &str) -> String {
    format!(
        r#"
#include "mma.cuh"
KERNEL __launch_bounds__(32) tile_product(float* out, const half* a, const half* b) {{
    DYNAMIC_SHARED(half, room);  // a [16, 16], then b [16, 8]
    const u32 lane = threadIdx.x;
    cp_async16(room + 8 * lane, a + 8 * lane, true);
    cp_async16(room + 256 + 8 * (lane & 15), b + 8 * (lane & 15), true);
    cp_async_commit();
    {wait}
    u32 fragment[4], columns[4];
    ldmatrix_x4(fragment, room + (lane & 15) * 16 + (lane >> 4) * 8);
    ldmatrix_x4_transposed(columns, room + 256 + (lane & 15) * 8);
    float d[4] = {{0.0f, 0.0f, 0.0f, 0.0f}};
    mma_m16n8k16(d, fragment, columns[0], columns[1]);
    const u32 row = lane >> 2, column = (lane & 3) * 2;
    for (u32 i = 0; i < 4; i++) out[(row + (i >> 1) * 8) * 8 + column + (i & 1)] = d[i];
    cp_async_wait<0>();
}}
"#
    )
}

fn run_tile_product(context: &std::sync::Arc<CudaContext>, source: &str) -> Vec<f32> {
    let stream = context.default_stream();
    let function = kernel(context, source, "tile_product");
    let value = |i: usize| f16::from_f32(((i * 7 + i / 5) % 23) as f32 / 8.0 - 1.0);
    let a: Vec<f16> = (0..256).map(value).collect();
    let b: Vec<f16> = (256..384).map(value).collect();
    let (a, b) = (
        stream.clone_htod(&a).unwrap(),
        stream.clone_htod(&b).unwrap(),
    );
    let mut out = stream.alloc_zeros::<f32>(128).unwrap();
    let mut launch = stream.launch_builder(&function);
    launch.arg(&mut out).arg(&a).arg(&b);
    // SAFETY: the arguments are those of the kernel.
    unsafe { launch.launch(geometry(1, 32, 768)) }.unwrap();
    stream.clone_dtoh(&out).unwrap()
}

#[test]
fn tensor_cores_multiply() {
    let Some(bench) = bench(&[]) else { return };
    let value = |i: usize| ((i * 7 + i / 5) % 23) as f32 / 8.0 - 1.0;
    let mut expected = Vec::new();
    for row in 0..16 {
        for column in 0..8 {
            let terms = (0..16).map(|k| value(row * 16 + k) * value(256 + k * 8 + column));
            expected.push(terms.sum::<f32>());
        }
    }
    let source = tile_product("cp_async_wait<0>(); __syncthreads();");
    for architecture in ["75", "80", "90"] {
        bench.emulator.set("EMULATOR_ARCH", architecture);
        let context = bench.device(0);
        for result in bench.in_all_orders(|| run_tile_product(&context, &source)) {
            assert_eq!(result, expected, "sm_{architecture}");
        }
    }
}

#[test]
fn a_copy_that_was_not_waited_for_is_found() {
    let Some(bench) = bench(&[]) else { return };
    let context = bench.device(0);
    let results = bench.in_all_orders(|| bits(&run_tile_product(&context, &tile_product(""))));
    assert!(results.iter().any(|result| *result != results[0]));
}

/// Runs `body` in two blocks of 64 threads on an array of 128 floats, in every order.
fn run_body(body: &str) -> Option<Vec<Result<Vec<u32>, DriverError>>> {
    let bench = bench(&[])?;
    let source = format!(
        "#include \"common.cuh\"\nKERNEL __launch_bounds__(64) body(float* out) {{ const u32 i = threadIdx.x; (void)i; {body} }}\n"
    );
    Some(bench.in_all_orders(|| {
        let context = bench.device(0);
        let (stream, function) = (context.default_stream(), kernel(&context, &source, "body"));
        let mut out = stream.alloc_zeros::<f32>(128)?;
        let mut launch = stream.launch_builder(&function);
        launch.arg(&mut out);
        // SAFETY: the arguments are those of the kernel.
        unsafe { launch.launch(geometry(2, 64, 1024)) }?;
        stream.clone_dtoh(&out).map(|values| bits(&values))
    }))
}

#[track_caller]
fn assert_orders_differ(body: &str) {
    let Some(results) = run_body(body) else {
        return;
    };
    let results: Vec<_> = results.into_iter().map(Result::unwrap).collect();
    assert!(results.iter().any(|result| *result != results[0]), "{body}");
}

#[track_caller]
fn assert_launch_fails(body: &str) {
    let Some(results) = run_body(body) else {
        return;
    };
    for result in results {
        let error = result.err().map(|error| error.0);
        assert_eq!(error, Some(CUDA_ERROR_LAUNCH_FAILED), "{body}");
    }
}

#[test]
fn forgotten_barriers_and_unset_memory_make_orders_differ() {
    assert_orders_differ("__shared__ float x[64]; x[i] = i; out[i] = x[63 - i];");
    assert_orders_differ("DYNAMIC_SHARED(float, x); x[i] = i; out[i] = x[(i + 1) & 63];");
    assert_orders_differ(
        "__shared__ float x[64]; if (i < 63) x[i] = i; __syncthreads(); out[i] = x[63];",
    );
    assert_orders_differ("DYNAMIC_SHARED(float, x); out[i] = x[i];");
    assert_orders_differ("out[i] += 1.0f + blockIdx.x; out[i] *= 2.0f;");
    assert_orders_differ("__shared__ float x; x = i; __syncwarp(); out[i] = x;");
}

#[test]
fn broken_synchronisation_fails_the_launch() {
    assert_launch_fails("if (i < 32) __syncthreads(); out[i] = 0.0f;");
    assert_launch_fails("if (i < 32) {\n__syncthreads();\n} else {\n__syncthreads();\n}");
    assert_launch_fails("if (i & 1) out[i] = __shfl_xor_sync(FULL_WARP, 1.0f, 2);");
    assert_launch_fails("if (i & 1) return; __syncwarp();");
    assert_launch_fails("out[i] = __shfl_sync(0xffffu, 1.0f, 0);");
    assert_launch_fails("__trap();");
}

#[test]
fn bad_addresses_fail_the_launch() {
    assert_launch_fails("out[0] = reinterpret_cast<const float4*>(out + 1)->x;");
    assert_launch_fails("float x[4] = {0, 1, 2, 3}; out[i] = x[(i + blockIdx.x * 4) & 7];");
    assert_launch_fails("__shared__ float x[8]; x[i] = 1.0f; out[i] = x[i];");
}

/// A line of blocks.
fn geometry(blocks: u32, threads: u32, shared: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: (blocks, 1, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: shared,
    }
}
