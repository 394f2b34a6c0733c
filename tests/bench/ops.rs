//! Throughput of the CPU backend's ops, at the sizes of one micro-batch of the small model of
//! `mp-train bench` (4 x 256 tokens, hidden size 1,024, 16 heads, vocabulary 32,768):
//! `cargo bench --bench ops`, or `cargo bench --bench ops -- attention` for some of them.
//!
//! Items are floating-point operations (two per multiply-add) where an op is bound by arithmetic, bytes
//! read and written where it is bound by memory. Every op runs on one thread and on all cores.

#![allow(clippy::unwrap_used)]

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use half::f16;
use mp_train::backend::cpu::{Cpu, CpuBuffer};
use mp_train::backend::{
    AdamwStep, AdamwTensor, AttentionLayout, Backend, Element, LinearShape, NormShape, RowGradient,
    Span, Sums,
};

/// T.
const ROWS: usize = 1024;
/// H.
const HIDDEN: usize = 1024;
/// F.
const INNER: usize = 4096;
/// N.
const HEADS: usize = 16;
/// D.
const HEAD_DIM: usize = HIDDEN / HEADS;
/// V.
const VOCABULARY: usize = 32_768;
/// r.
const RANK: usize = 8;
/// Tokens of a sequence.
const SEQUENCE: usize = 256;

fn main() {
    divan::main();
}

/// One thread, and as many as there are cores.
fn threads() -> Vec<usize> {
    match std::thread::available_parallelism() {
        Ok(cores) if cores.get() > 1 => vec![1, cores.get()],
        _ => vec![1],
    }
}

fn cpu<E: Element>(threads: usize) -> Cpu<E> {
    Cpu::new(threads).unwrap()
}

/// Values between -1 and 1 without a pattern that a kernel could profit from.
fn values<E: Element>(cpu: &Cpu<E>, len: usize) -> CpuBuffer<E> {
    let value =
        |i: u32| E::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0);
    let values: Vec<E> = (0..len as u32).map(value).collect();
    cpu.upload(&values).unwrap()
}

fn shape(in_features: usize, out_features: usize) -> LinearShape {
    LinearShape {
        rows: ROWS,
        in_features,
        out_features,
        sums: Sums::F32,
    }
}

/// Operations of a product of this shape.
fn product(shape: LinearShape) -> ItemsCount {
    ItemsCount::new(2 * shape.rows * shape.in_features * shape.out_features)
}

/// Bytes of `tensors` of `len` elements.
fn traffic<E: Element>(tensors: usize, len: usize) -> BytesCount {
    BytesCount::new(tensors * len * E::SIZE)
}

fn forward<E: Element>(bencher: Bencher<'_, '_>, threads: usize, shape: LinearShape) {
    let cpu = cpu::<E>(threads);
    let mut out = cpu.zeros::<E>(ROWS * shape.out_features).unwrap();
    let x = values(&cpu, ROWS * shape.in_features);
    let weight = values(&cpu, shape.in_features * shape.out_features);
    bencher.counter(product(shape)).bench_local(|| {
        cpu.linear(&mut out, &x, &weight, None, shape, 1.0, false)
            .unwrap();
    });
}

fn backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize, shape: LinearShape) {
    let cpu = cpu::<E>(threads);
    let mut dx = cpu.zeros::<E>(ROWS * shape.in_features).unwrap();
    let dout = values(&cpu, ROWS * shape.out_features);
    let weight = values(&cpu, shape.in_features * shape.out_features);
    bencher.counter(product(shape)).bench_local(|| {
        cpu.linear_backward(&mut dx, &dout, &weight, shape, 1.0, false)
            .unwrap();
    });
}

fn weight<E: Element>(bencher: Bencher<'_, '_>, threads: usize, shape: LinearShape) {
    let cpu = cpu::<E>(threads);
    let mut dweight = cpu
        .zeros::<f32>(shape.in_features * shape.out_features)
        .unwrap();
    let dout = values(&cpu, ROWS * shape.out_features);
    let x = values(&cpu, ROWS * shape.in_features);
    bencher.counter(product(shape)).bench_local(|| {
        cpu.weight_gradient(&mut dweight, &dout, &x, shape, 1e-6)
            .unwrap();
    });
}

/// Products of a block, and those of its adapter.
mod products {
    use super::*;

    #[divan::bench(types = [f32, f16], args = threads())]
    fn qkv<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        forward::<E>(bencher, threads, shape(HIDDEN, 3 * HIDDEN));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn widening<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        forward::<E>(bencher, threads, shape(HIDDEN, INNER));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn narrowing<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        forward::<E>(bencher, threads, shape(INNER, HIDDEN));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn widening_backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        backward::<E>(bencher, threads, shape(HIDDEN, INNER));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn narrowing_backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        backward::<E>(bencher, threads, shape(INNER, HIDDEN));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn widening_weight<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        weight::<E>(bencher, threads, shape(HIDDEN, INNER));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn lora_down<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        forward::<E>(bencher, threads, shape(HIDDEN, RANK));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn lora_up<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        forward::<E>(bencher, threads, shape(RANK, 3 * HIDDEN));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn lora_up_backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        backward::<E>(bencher, threads, shape(RANK, 3 * HIDDEN));
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn lora_up_weight<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        weight::<E>(bencher, threads, shape(RANK, 3 * HIDDEN));
    }
}

/// Causal attention: of the two products per pair of tokens of one sequence (five backward, one of them
/// the scores again), those of visible pairs are counted.
mod attention {
    use super::*;

    const SCALE: f32 = 0.125;

    fn visible_pairs() -> usize {
        ROWS / SEQUENCE * SEQUENCE * (SEQUENCE + 1) / 2
    }

    fn spans() -> Vec<Span> {
        let span = |start: usize| Span {
            q_start: start,
            q_len: SEQUENCE,
            kv_start: start,
            kv_len: SEQUENCE,
            context_length: 0,
        };
        (0..ROWS).step_by(SEQUENCE).map(span).collect()
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn forward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let layout = AttentionLayout::grouped_per_head(HEADS, HEAD_DIM);
        let spans = spans();
        let qkv = values(&cpu, ROWS * 3 * HIDDEN);
        let mut out = cpu.zeros(ROWS * HIDDEN).unwrap();
        let mut lse = cpu.zeros(ROWS * HEADS).unwrap();
        let flop = 4 * visible_pairs() * HIDDEN;
        bencher.counter(ItemsCount::new(flop)).bench_local(|| {
            cpu.attention(&mut out, &mut lse, &qkv, &qkv, None, &layout, &spans, SCALE)
                .unwrap();
        });
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let layout = AttentionLayout::grouped_per_head(HEADS, HEAD_DIM);
        let spans = spans();
        let qkv = values(&cpu, ROWS * 3 * HIDDEN);
        let dout = values(&cpu, ROWS * HIDDEN);
        let mut out = cpu.zeros(ROWS * HIDDEN).unwrap();
        let mut lse = cpu.zeros(ROWS * HEADS).unwrap();
        cpu.attention(&mut out, &mut lse, &qkv, &qkv, None, &layout, &spans, SCALE)
            .unwrap();
        let mut dqkv = cpu.zeros(ROWS * 3 * HIDDEN).unwrap();
        let flop = 10 * visible_pairs() * HIDDEN;
        bencher.counter(ItemsCount::new(flop)).bench_local(|| {
            cpu.attention_backward(
                &mut dqkv, None, &dout, &out, &lse, &qkv, None, &layout, &spans, SCALE,
            )
            .unwrap();
        });
    }
}

/// What is bound by memory.
mod rows {
    use super::*;

    #[divan::bench(types = [f32, f16], args = threads())]
    fn gelu<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let len = ROWS * INNER;
        let x = values(&cpu, len);
        let mut out = cpu.zeros(len).unwrap();
        bencher
            .counter(traffic::<E>(2, len))
            .bench_local(|| cpu.gelu(&mut out, &x, len).unwrap());
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn gelu_backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let len = ROWS * INNER;
        let x = values(&cpu, len);
        let mut dx = values(&cpu, len);
        // The gradient shrinks from call to call, to nothing but zeros in the end; it must not become a
        // subnormal number, which costs many times as much.
        bencher.counter(traffic::<E>(3, len)).bench_local(|| {
            cpu.write(&mut dx, &x).unwrap();
            cpu.gelu_backward(&mut dx, &x, len).unwrap();
        });
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn layer_norm<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let x = values(&self::cpu::<f32>(1), ROWS * HIDDEN);
        let (weight, bias) = (values(&cpu, HIDDEN), values(&cpu, HIDDEN));
        let mut out = cpu.zeros(ROWS * HIDDEN).unwrap();
        let mut stats = cpu.zeros(2 * ROWS).unwrap();
        let bytes = ROWS * HIDDEN * (f32::SIZE + E::SIZE);
        bencher.counter(BytesCount::new(bytes)).bench_local(|| {
            cpu.layer_norm(&mut out, &mut stats, &x, &weight, &bias, NORM)
                .unwrap();
        });
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn layer_norm_backward<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let x = values(&self::cpu::<f32>(1), ROWS * HIDDEN);
        let (weight, bias) = (values(&cpu, HIDDEN), values(&cpu, HIDDEN));
        let mut out = cpu.zeros(ROWS * HIDDEN).unwrap();
        let mut stats = cpu.zeros(2 * ROWS).unwrap();
        cpu.layer_norm(&mut out, &mut stats, &x, &weight, &bias, NORM)
            .unwrap();
        let (dout, mut dx) = (out, cpu.zeros(ROWS * HIDDEN).unwrap());
        let bytes = ROWS * HIDDEN * (f32::SIZE + 3 * E::SIZE);
        bencher.counter(BytesCount::new(bytes)).bench_local(|| {
            let dout = RowGradient {
                dout: &dout,
                residual: Some((&dout, 2.0)),
            };
            cpu.layer_norm_backward(&mut dx, dout, &x, &stats, &weight, NORM)
                .unwrap();
        });
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn rms_norm<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let x = values(&self::cpu::<f32>(1), ROWS * HIDDEN);
        let weight = values(&cpu, HIDDEN);
        let mut out = cpu.zeros(ROWS * HIDDEN).unwrap();
        let mut stats = cpu.zeros(ROWS).unwrap();
        let bytes = ROWS * HIDDEN * (f32::SIZE + E::SIZE);
        bencher.counter(BytesCount::new(bytes)).bench_local(|| {
            cpu.rms_norm(&mut out, &mut stats, &x, &weight, NORM)
                .unwrap();
        });
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn cross_entropy<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        const TARGETS: usize = 128;
        let cpu = cpu::<E>(threads);
        let ids: Vec<u32> = (0..TARGETS as u32).map(|row| 211 * row).collect();
        let ids = cpu.upload(&ids).unwrap();
        let mut logits = values(&cpu, TARGETS * VOCABULARY);
        let mut loss = cpu.zeros(TARGETS).unwrap();
        // Gradients become the logits of the next call: no less ordinary ones.
        bencher
            .counter(traffic::<E>(2, TARGETS * VOCABULARY))
            .bench_local(|| {
                cpu.cross_entropy(&mut loss, &mut logits, &ids, 0, TARGETS, VOCABULARY, 1.0)
                    .unwrap();
            });
    }

    #[divan::bench(types = [f32, f16], args = threads())]
    fn adamw<E: Element>(bencher: Bencher<'_, '_>, threads: usize) {
        let cpu = cpu::<E>(threads);
        let host = self::cpu::<f32>(1);
        let len = HIDDEN * INNER;
        let (mut working, mut master) = (cpu.zeros(len).unwrap(), values(&host, len));
        let (mut exp_avg, mut exp_avg_sq) = (cpu.zeros(len).unwrap(), cpu.zeros(len).unwrap());
        let gradient = values(&host, len);
        let step = AdamwStep {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            bias_correction1: 0.1,
            bias_correction2: 0.001,
            gradient_scale: 1.0,
        };
        let bytes = len * (7 * f32::SIZE + E::SIZE);
        bencher.counter(BytesCount::new(bytes)).bench_local(|| {
            let tensor = AdamwTensor {
                working: &mut working,
                master: &mut master,
                exp_avg: &mut exp_avg,
                exp_avg_sq: &mut exp_avg_sq,
                gradient: &gradient,
                weight_decay: 0.01,
                len,
            };
            cpu.adamw(&mut [tensor], step).unwrap();
        });
    }

    const NORM: NormShape = NormShape {
        rows: ROWS,
        cols: HIDDEN,
        eps: 1e-5,
    };
}
