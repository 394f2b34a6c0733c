//! The few lines of the kernels that differ between architectures, each by itself: tensor-core
//! product, matrix loads, asynchronous copies, half precision. On emulated GPUs of every generation,
//! or with MP_TRAIN_TEST_GPU=1 on the GPU of this machine, as PTX of compute_75 and compute_80.

#![allow(clippy::unwrap_used)]

mod cuda_emulator;

use std::sync::Arc;

use cudarc::driver::{
    CudaContext, CudaModule, CudaStream, DeviceRepr, LaunchConfig, PushKernelArg,
};
use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};
use half::f16;

const WRAPPERS: &str = include_str!("kernel_wrappers/wrappers.cu");
const HEADERS: [(&str, &str); 3] = [
    ("mma.cuh", include_str!("../kernels/mma.cuh")),
    ("common.cuh", include_str!("../kernels/common.cuh")),
    ("half.cuh", include_str!("../kernels/half.cuh")),
];

#[test]
fn wrappers_do_what_the_kernels_take_them_for() {
    if cuda_emulator::on_this_gpu() {
        for arch in ["compute_75", "compute_80"] {
            check(arch);
        }
        return;
    }
    let Some(emulator) = cuda_emulator::Emulator::build() else {
        return;
    };
    let loaded = emulator.load_here();
    for arch in ["75", "80", "86", "90"] {
        loaded.set("EMULATOR_ARCH", arch);
        for order in cuda_emulator::ORDERS {
            loaded.set_order(order);
            check(if arch == "75" {
                "compute_75"
            } else {
                "compute_80"
            });
        }
    }
}

/// The source with our own headers put in their place, each once.
fn source() -> String {
    let mut text = WRAPPERS.to_owned();
    for (name, header) in HEADERS {
        let include = format!("#include \"{name}\"");
        text = text.replacen(&include, header, 1).replace(&include, "");
    }
    text.replace("#pragma once", "")
}

fn check(arch: &'static str) {
    let options = CompileOptions {
        arch: Some(arch),
        options: vec!["--std=c++17".to_owned()],
        ..CompileOptions::default()
    };
    let ptx = compile_ptx_with_opts(source(), options).unwrap();
    let context = CudaContext::new(0).unwrap();
    let gpu = Gpu {
        stream: context.default_stream(),
        module: context.load_module(ptx).unwrap(),
    };
    product(&gpu, arch);
    matrices(&gpu, arch);
    copies(&gpu, arch);
    halves(&gpu, arch);
}

struct Gpu {
    stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
}

impl Gpu {
    /// Runs a kernel of one warp over uploaded inputs; `len` values of output, of a pattern before.
    fn run<T: DeviceRepr + Copy, X: DeviceRepr>(
        &self,
        kernel: &str,
        before: T,
        len: usize,
        inputs: &[&[X]],
        more: Option<&[f32]>,
        count: Option<u32>,
    ) -> Vec<T> {
        let function = self.module.load_function(kernel).unwrap();
        let mut out = self.stream.clone_htod(&vec![before; len]).unwrap();
        let inputs: Vec<_> = inputs
            .iter()
            .map(|input| self.stream.clone_htod(*input).unwrap())
            .collect();
        let more = more.map(|more| self.stream.clone_htod(more).unwrap());
        let mut launch = self.stream.launch_builder(&function);
        launch.arg(&mut out);
        for input in &inputs {
            launch.arg(input);
        }
        if let Some(more) = &more {
            launch.arg(more);
        }
        if let Some(count) = &count {
            launch.arg(count);
        }
        let warp = LaunchConfig {
            grid_dim: (1, 1, 1),
            block_dim: (32, 1, 1),
            shared_mem_bytes: 0,
        };
        // SAFETY: each kernel of wrappers.cu takes these arguments, in this order.
        unsafe { launch.launch(warp) }.unwrap();
        self.stream.clone_dtoh(&out).unwrap()
    }
}

/// Numbers between -1 and 1 that repeat.
fn numbers(count: usize) -> Vec<f32> {
    let number = |i: usize| ((i * 7_919 + 13) % 2_003) as f32 / 1_001.5 - 1.0;
    (0..count).map(number).collect()
}

fn rounded(values: &[f32]) -> Vec<f16> {
    values.iter().map(|&value| f16::from_f32(value)).collect()
}

fn product(gpu: &Gpu, arch: &str) {
    let (a, b) = (rounded(&numbers(256)), rounded(&numbers(384)[256..]));
    let c: Vec<f32> = numbers(128).iter().map(|x| 3.0 * x).collect();
    let found = gpu.run("product", f32::NAN, 128, &[&a, &b], Some(&c), None);
    for row in 0..16 {
        for col in 0..8 {
            let terms = (0..16).map(|k| a[row * 16 + k].to_f64() * b[k * 8 + col].to_f64());
            let exact = terms.sum::<f64>() + f64::from(c[row * 8 + col]);
            let error = (f64::from(found[row * 8 + col]) - exact).abs();
            assert!(
                error < 1e-5,
                "{arch}: product {row}, {col} is off by {error}"
            );
        }
    }
}

fn matrices(gpu: &Gpu, arch: &str) {
    let x: Vec<f16> = (0..256u16).map(|i| f16::from_bits(0x1000 + i)).collect();
    let found = gpu.run("matrices", 0u32, 256, &[&x], None, None);
    let at = |matrix: usize, row: usize, col: usize| {
        u32::from(x[(matrix * 8 + row) * 8 + col].to_bits())
    };
    for lane in 0..32 {
        let (g, t) = (lane / 4, 2 * (lane % 4));
        for matrix in 0..4 {
            let plain = at(matrix, g, t) | at(matrix, g, t + 1) << 16;
            let transposed = at(matrix, t, g) | at(matrix, t + 1, g) << 16;
            let place = lane * 4 + matrix;
            assert_eq!(found[place], plain, "{arch}: lane {lane}, matrix {matrix}");
            assert_eq!(
                found[128 + place],
                transposed,
                "{arch}: lane {lane}, matrix {matrix}, transposed"
            );
        }
    }
}

fn copies(gpu: &Gpu, arch: &str) {
    let x: Vec<u32> = (0..256).map(|i| 0x9000_0000 + i).collect();
    let found = gpu.run("copies", 7u32, 256, &[&x], None, None);
    for (i, (&found, &x)) in found.iter().zip(&x).enumerate() {
        let expected = if (i / 4) % 3 == 0 { 0 } else { x };
        assert_eq!(found, expected, "{arch}: word {i}");
    }
}

fn halves(gpu: &Gpu, arch: &str) {
    let mut x = numbers(1_000);
    x.extend([
        0.0,
        -0.0,
        65_504.0,
        65_520.0,
        1e-8,
        6e-8,
        3e-5,
        1.000_488_3,
        f32::INFINITY,
        f32::NAN,
    ]);
    let n = x.len();
    let found = gpu.run("halves", 7.0f32, 4 * n, &[&x], None, Some(n as u32));
    for (i, &x) in x.iter().enumerate() {
        let half = |x: f32| f16::from_f32(x).to_f32();
        for (what, found, expected) in [
            ("half", found[i], half(x)),
            ("low", found[n + i], half(x)),
            ("high", found[2 * n + i], half(-x)),
            ("eighth", found[3 * n + i], half(x * 8.0)),
        ] {
            let same =
                found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
            assert!(same, "{arch}: {what} of {x} is {found}, not {expected}");
        }
    }
}
