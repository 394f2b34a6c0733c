//! Every op of [`Backend`] on every backend, against naive f64 loops.
//!
//! One list of cases serves all backends; a backend joins by one test function below. What a case
//! shows: the result (within what f32 sums and one rounding to the storage type allow), that nothing
//! else was written, that inputs stayed as they were, that gradients are those of the forward op
//! (central differences), and that the result does not depend on the number of threads. An op of the
//! trait without a case fails the run.

#![allow(clippy::unwrap_used)]

#[path = "ops/activation.rs"]
mod activation;
#[path = "ops/attention.rs"]
mod attention;
#[path = "ops/attention_exact.rs"]
mod attention_exact;
#[path = "ops/buffer.rs"]
mod buffer;
#[path = "ops/check.rs"]
mod check;
#[path = "cuda_emulator/mod.rs"]
mod cuda_emulator;
#[path = "ops/dropout.rs"]
mod dropout;
#[path = "ops/half_sums.rs"]
mod half_sums;
#[path = "ops/layouts.rs"]
mod layouts;
#[path = "ops/linear.rs"]
mod linear;
#[path = "ops/linear_gelu.rs"]
mod linear_gelu;
#[path = "ops/loss.rs"]
mod loss;
#[path = "ops/low_rank.rs"]
mod low_rank;
#[path = "ops/memory.rs"]
mod memory;
#[path = "ops/norm.rs"]
mod norm;
#[path = "ops/numbers.rs"]
mod numbers;
#[path = "ops/optimiser.rs"]
mod optimiser;
#[path = "ops/quant.rs"]
mod quant;
#[path = "ops/residual_norm.rs"]
mod residual_norm;
#[path = "ops/rms_norm.rs"]
mod rms_norm;
#[path = "ops/rotary.rs"]
mod rotary;
#[path = "ops/rows.rs"]
mod rows;
#[path = "ops/swiglu.rs"]
mod swiglu;
#[path = "ops/synthetic.rs"]
mod synthetic;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;
use std::sync::Arc;

use half::f16;
use mp_train::backend::cpu::Cpu;
use mp_train::backend::cuda::Cuda;
use mp_train::backend::{Backend, Pulse};

use check::{Check, Tolerance};
use cuda_emulator::{Emulator, Order};

#[test]
fn cpu_f32() {
    let threads =
        [1, 2, 3].map(|threads| move |pulse: &_| Cpu::<f32>::with_pulse(threads, pulse).unwrap());
    drive("cpu-f32", Tolerance::F32, threads);
}

#[test]
fn cpu_f16() {
    let threads =
        [1, 2, 3].map(|threads| move |pulse: &_| Cpu::<f16>::with_pulse(threads, pulse).unwrap());
    drive("cpu-f16", Tolerance::F16, threads);
}

/// `MP_TRAIN_TEST_GPU=1 cargo test --release --test ops cuda_on_this_gpu`; scripts/check_gpu.sh runs it.
#[test]
fn cuda_on_this_gpu() {
    if !cuda_emulator::on_this_gpu() {
        println!("skipped: MP_TRAIN_TEST_GPU is not 1");
        return;
    }
    drive(
        "cuda",
        Tolerance::CUDA,
        [(); 2].map(|()| |pulse: &_| Cuda::with_pulse(0, pulse).unwrap()),
    );
}

/// Every order of the threads and blocks gives the same bits, on every generation of GPUs. Each
/// generation has a process of its own, as the emulated one is for the whole process.
#[test]
fn cuda_emulated() {
    if cuda_emulator::on_this_gpu() {
        return;
    }
    let Some(emulator) = Emulator::build() else {
        return;
    };
    if let Ok(arch) = std::env::var(ARCH_OF_CHILD) {
        let loaded = emulator.load_here();
        loaded.set("EMULATOR_ARCH", &arch);
        let mut orders = vec![Order::Forward, Order::Reverse, Order::Random(1)];
        // One order is enough for a sanitizer.
        if std::env::var_os("EMULATOR_SANITIZE").is_some() {
            orders = vec![Order::Forward];
        }
        let builds = orders.into_iter().map(|order| {
            move |pulse: &_| {
                loaded.set_order(order);
                Cuda::with_pulse(0, pulse).unwrap()
            }
        });
        return drive(&format!("cuda on sm_{arch}"), Tolerance::CUDA, builds);
    }
    let child = |arch: &'static str, more: &'static [(&str, &str)]| {
        std::thread::spawn(move || {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "cuda_emulated", "--nocapture"])
                .env(ARCH_OF_CHILD, arch)
                .envs(more.iter().copied())
                .output()
                .unwrap()
        })
    };
    // A cuBLASLt that has no algorithm with GELU gets the same cases.
    let children = [
        child("75", &[]),
        child("80", &[]),
        child("86", &[]),
        child("90", &[]),
        child("90", &PLAIN),
    ];
    let ended = children.map(|child| child.join().unwrap());
    for child in &ended {
        print!("{}", String::from_utf8_lossy(&child.stdout));
        eprint!("{}", String::from_utf8_lossy(&child.stderr));
    }
    assert!(ended.iter().all(|child| child.status.success()));
}

/// What makes cuBLASLt have no algorithm with GELU, and the cases that are about it.
const PLAIN: [(&str, &str); 2] = [
    ("EMULATOR_EPILOGUES", "plain"),
    ("OPS_FAMILIES", "linear_gelu,half_sums"),
];

/// Tells a child of `cuda_emulated` its generation.
const ARCH_OF_CHILD: &str = "OPS_EMULATED_ARCH";

/// All cases on a backend. The first of `builds` is held against the exact results, the others
/// (more threads, say) must repeat its results bit for bit.
fn drive<B: Backend, F: Fn(&Arc<Pulse>) -> B>(
    name: &str,
    tolerance: Tolerance,
    builds: impl IntoIterator<Item = F>,
) {
    // `OPS_FAMILIES=attention,norm` runs some of the families.
    let chosen = std::env::var("OPS_FAMILIES").unwrap_or_default();
    let only: Vec<&str> = chosen.split(',').filter(|name| !name.is_empty()).collect();
    let mut check = Check::new(name, tolerance);
    for build in builds {
        let pulse = Arc::new(Pulse::default());
        let backend = build(&pulse);
        if only.is_empty() {
            reports(&backend, &pulse, &mut check);
        }
        for (family, cases) in families::<B>() {
            if !only.is_empty() && !only.contains(&family) {
                continue;
            }
            // A family that panics leaves the others their say.
            if catch_unwind(AssertUnwindSafe(|| cases(&backend, &mut check))).is_err() {
                check.fail(&format!("panicked in the cases of {family}"));
            }
        }
        check.next_build();
    }
    let expected = match only.is_empty() {
        true => ops_of_the_trait(),
        false => Vec::new(),
    };
    check.finish(&expected);
}

/// What a backend says of itself: a mark is reached when what was queued before it is done, which a read
/// waits for; and no memory is in use where none was planned.
fn reports<B: Backend>(b: &B, pulse: &Pulse, check: &mut Check) {
    for place in [1_u32, 7, 1 << 30] {
        check.run(b, "mark", format!("place {place}"), &[], || {
            let buffer = b.upload(&[place; 40_001])?;
            b.mark(place.into())?;
            b.read(&buffer, 1).map(|_| ())
        });
        check.expect_bits(&[pulse.place() as u32], &[place]);
    }
    check.run(
        b,
        "memory_use",
        "nothing planned".to_owned(),
        &[],
        || Ok(()),
    );
    check.expect_bits(&[u32::from(b.memory_use().is_some())], &[0]);
}

type Cases<B> = fn(&B, &mut Check);

fn families<B: Backend>() -> [(&'static str, Cases<B>); 18] {
    [
        ("memory", memory::cases::<B>),
        ("rows", rows::cases::<B>),
        ("norm", norm::cases::<B>),
        ("rms_norm", rms_norm::cases::<B>),
        ("linear", linear::cases::<B>),
        ("residual_norm", residual_norm::cases::<B>),
        ("low_rank", low_rank::cases::<B>),
        ("linear_gelu", linear_gelu::cases::<B>),
        ("half_sums", half_sums::cases::<B>),
        ("rotary", rotary::cases::<B>),
        ("attention", attention::cases::<B>),
        ("dropout", dropout::cases::<B>),
        ("activation", activation::cases::<B>),
        ("swiglu", swiglu::cases::<B>),
        ("loss", loss::cases::<B>),
        ("optimiser", optimiser::cases::<B>),
        ("quant", quant::cases::<B>),
        ("synthetic", synthetic::cases::<B>),
    ]
}

/// Names of the functions of the trait, read from its source.
fn ops_of_the_trait() -> Vec<String> {
    let source = include_str!("../src/backend/mod.rs");
    let start = source.find("pub trait Backend").unwrap();
    let body = &source[start..start + source[start..].find("\n}").unwrap()];
    let ops: Vec<String> = body
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("fn "))
        .map(|rest| {
            rest.chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        })
        .collect();
    assert!(
        ops.len() >= 40,
        "only {} ops found in the trait's source",
        ops.len()
    );
    ops
}
