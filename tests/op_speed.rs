//! How fast the ops of ChatGLM-6B are on the GPU at hand: attention, products, and what moves memory, with
//! the rates that they are held against taken in the same run.
//!
//! `MP_TRAIN_TEST_GPU=1 OP_SPEED_RESULTS=FILE cargo test --release --test op_speed` measures and writes JSON;
//! scripts/check_gpu.sh runs it; `OP_SPEED_SIZES=tiny` takes the smallest shapes. Without a GPU only the way it goes is tested, on an emulated one.

#![allow(clippy::unwrap_used)]

mod cuda_emulator;
mod op_cases;

use std::time::{Duration, Instant};

use cuda_emulator::Emulator;
use cudarc::driver::result::{malloc_async, memcpy_dtod_async, stream};
use mp_train::backend::cuda::Cuda;
use mp_train::backend::{Backend, BackendError};
use op_cases::{Batch, Bound, Case, Sizes, Work};
use serde::Serialize;

/// Sequences and their length: one, and equal numbers of tokens. scripts/peers/attention.py has the same.
const BATCHES: [Batch; 4] = [(1, 1024), (16, 512), (8, 1024), (4, 2048)];

/// How long and how often an op is run.
#[derive(Clone, Copy)]
struct Pace {
    /// Timed rounds.
    rounds: usize,
    /// Of a round, at least; one wait for the GPU stands at its end.
    round: Duration,
}

const PACE: Pace = Pace {
    rounds: 7,
    round: Duration::from_millis(40),
};

/// To see that it goes, on an emulated GPU.
const TINY_BATCHES: [Batch; 2] = [(1, 65), (2, 33)];
const TINY_PACE: Pace = Pace {
    rounds: 5,
    round: Duration::ZERO,
};

/// Seconds of one run of an op, over several rounds of many.
#[derive(Debug, Serialize)]
struct Seconds {
    median: f64,
    min: f64,
    max: f64,
    rounds: usize,
    runs_of_a_round: usize,
}

#[derive(Debug, Serialize)]
struct Measured {
    op: String,
    bound: Bound,
    seconds: Seconds,
    /// Of the operations or bytes that the op cannot do without.
    tflops: f64,
    gbytes_per_second: f64,
    /// Of the rate that bounds it, measured in the same run: of products for products and attention, of a
    /// copy for all else.
    share: f64,
}

#[derive(Debug, Serialize)]
struct Results {
    sizes: Sizes,
    /// The fastest of the products, 10^12 operations per second.
    product_tflops: f64,
    product_op: String,
    /// A copy of the driver's between two buffers of `copy_bytes`: bytes read and written.
    copy_gbytes_per_second: f64,
    copy_bytes: usize,
    copy_seconds: Seconds,
    ops: Vec<Measured>,
}

#[test]
fn on_this_gpu() {
    if !cuda_emulator::on_this_gpu() {
        println!("skipped: MP_TRAIN_TEST_GPU is not 1");
        return;
    }
    let results = match std::env::var("OP_SPEED_SIZES").as_deref() {
        Err(_) => measure(&Sizes::CHATGLM_6B, &BATCHES, 1 << 30, PACE),
        Ok("tiny") => measure(&Sizes::TINY, &TINY_BATCHES, 1 << 12, TINY_PACE),
        Ok(other) => panic!("OP_SPEED_SIZES is {other}: tiny, or nothing for ChatGLM-6B"),
    };
    let text = serde_json::to_string_pretty(&results).unwrap();
    match std::env::var_os("OP_SPEED_RESULTS") {
        Some(path) => std::fs::write(path, text + "\n").unwrap(),
        None => println!("{text}"),
    }
    println!(
        "{} ops measured, products {:.1} TFLOP/s, copies {:.0} GB/s: passed",
        results.ops.len(),
        results.product_tflops,
        results.copy_gbytes_per_second
    );
}

#[test]
fn on_an_emulated_gpu_every_op_is_measured() {
    if cuda_emulator::on_this_gpu() {
        return;
    }
    let Some(emulator) = Emulator::build() else {
        return;
    };
    emulator.load_here();
    let results = measure(&Sizes::TINY, &TINY_BATCHES, 1 << 12, TINY_PACE);
    let number = |of: &dyn Fn(&Measured) -> bool| results.ops.iter().filter(|op| of(op)).count();
    assert_eq!(number(&|op| op.bound == Bound::Products), 13);
    assert_eq!(number(&|op| op.op.starts_with("attention")), 4 + 2);
    let names: std::collections::BTreeSet<&str> =
        results.ops.iter().map(|op| op.op.as_str()).collect();
    assert_eq!(names.len(), results.ops.len(), "an op is there twice");
    for op in &results.ops {
        let Seconds {
            median, min, max, ..
        } = op.seconds;
        assert!(0.0 < min && min <= median && median <= max, "{op:?}");
        assert!(op.gbytes_per_second > 0.0 && op.share > 0.0, "{op:?}");
        assert_eq!(op.seconds.rounds, 5);
    }
}

fn measure(sizes: &Sizes, batches: &[Batch], copy_bytes: usize, pace: Pace) -> Results {
    let cuda = Cuda::new(0).unwrap();
    let copy_seconds = copy(copy_bytes, pace);
    let copy_rate = 2.0 * copy_bytes as f64 / copy_seconds.median;
    let mut timed = Vec::new();
    op_cases::visit(&cuda, sizes, batches, &mut |cuda, case| {
        let Case {
            name,
            bound,
            work,
            mut run,
            ..
        } = case;
        // Reading a value waits for the GPU.
        let place = cuda.zeros::<f32>(1).unwrap();
        let seconds = time(pace, || run(cuda), || cuda.read(&place, 1).map(drop));
        timed.push((name, bound, work, seconds));
    });
    let rate = |work: &Work, seconds: &Seconds| work.flops as f64 / seconds.median;
    let products = timed
        .iter()
        .filter(|(_, bound, ..)| *bound == Bound::Products);
    let fastest = products.max_by(|a, b| rate(&a.2, &a.3).total_cmp(&rate(&b.2, &b.3)));
    let (product_op, _, work, seconds) = fastest.unwrap();
    let (product_op, product_rate) = (product_op.clone(), rate(work, seconds));
    let judged = |(op, bound, work, seconds): (String, Bound, Work, Seconds)| {
        let (flops, bytes) = (
            rate(&work, &seconds),
            (work.read + work.written) as f64 / seconds.median,
        );
        Measured {
            op,
            bound,
            tflops: flops / 1e12,
            gbytes_per_second: bytes / 1e9,
            share: match bound {
                Bound::Products | Bound::Attention => flops / product_rate,
                Bound::Memory => bytes / copy_rate,
            },
            seconds,
        }
    };
    Results {
        sizes: *sizes,
        product_tflops: product_rate / 1e12,
        product_op,
        copy_gbytes_per_second: copy_rate / 1e9,
        copy_bytes,
        copy_seconds,
        ops: timed.into_iter().map(judged).collect(),
    }
}

/// Runs an op until a round takes long enough, then the rounds that count.
fn time(
    pace: Pace,
    mut run: impl FnMut() -> Result<(), BackendError>,
    wait: impl Fn() -> Result<(), BackendError>,
) -> Seconds {
    let mut round = |runs: usize| {
        let start = Instant::now();
        for _ in 0..runs {
            run().unwrap();
        }
        wait().unwrap();
        start.elapsed()
    };
    round(1);
    let mut runs = 1;
    while round(runs) < pace.round {
        runs *= 2;
    }
    let mut seconds: Vec<f64> = (0..pace.rounds)
        .map(|_| round(runs).as_secs_f64() / runs as f64)
        .collect();
    seconds.sort_by(f64::total_cmp);
    Seconds {
        median: seconds[pace.rounds / 2],
        min: seconds[0],
        max: seconds[pace.rounds - 1],
        rounds: pace.rounds,
        runs_of_a_round: runs,
    }
}

/// The rate of memory: a copy of the driver's, in the context that is current on this thread.
fn copy(bytes: usize, pace: Pace) -> Seconds {
    let queue = stream::create(stream::StreamKind::NonBlocking).unwrap();
    // SAFETY: the stream lives until the end; both places are freed behind all that uses them.
    let [to, from] = [(); 2].map(|()| unsafe { malloc_async(queue, bytes) }.unwrap());
    let seconds = time(
        pace,
        || {
            // SAFETY: both places have that many bytes and do not overlap.
            unsafe { memcpy_dtod_async(to, from, bytes, queue) }.unwrap();
            Ok(())
        },
        || {
            // SAFETY: the stream is alive.
            unsafe { stream::synchronize(queue) }.unwrap();
            Ok(())
        },
    );
    // SAFETY: nothing uses either any more; the stream is idle.
    unsafe {
        cudarc::driver::result::free_async(to, queue).unwrap();
        cudarc::driver::result::free_async(from, queue).unwrap();
        stream::synchronize(queue).unwrap();
        stream::destroy(queue).unwrap();
    }
    seconds
}
