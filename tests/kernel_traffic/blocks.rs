//! How many kernels and products a block of a model asks a GPU for.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mp_train::adapter::ParameterState;
use mp_train::adapter::initial::initial_values;
use mp_train::backend::cuda::Cuda;
use mp_train::backend::{Span, Sums};
use mp_train::checkpoint::synthetic::SyntheticTensors;
use mp_train::config::model::ModelConfig;
use mp_train::config::model_size::ModelSize;
use mp_train::config::run::{AdapterSection, FullSection, LoraSection, PrefixSection, Recompute};
use mp_train::model::batch::BatchRows;
use mp_train::model::load::Loader;
use mp_train::model::rotary::RotaryPrecision;
use mp_train::model::stage::{ChunkShape, Stage, StageShape};
use mp_train::model::trainables::Trainables;
use mp_train::model::weights;
use serde::Serialize;

use crate::{ARCH, settle};

/// Tokens of the micro-batch, one sequence.
const ROWS: usize = 64;

const SEED: u64 = 42;

/// One micro-batch through one block that has others before and behind it, nothing computed again: what a
/// model of three blocks asks for more than one of two.
#[derive(Serialize)]
pub struct BlockLaunches {
    arch: &'static str,
    rows: usize,
    hidden_size: usize,
    blocks: Vec<OfBlock>,
}

#[derive(Serialize)]
struct OfBlock {
    model: &'static str,
    adapter: &'static str,
    forward: Calls,
    backward: Calls,
}

/// What is queued on the stream.
#[derive(Serialize)]
struct Calls {
    kernels: i64,
    /// Calls of cuBLASLt.
    products: i64,
    by_kernel: BTreeMap<String, i64>,
}

impl Calls {
    /// Those of `self` that `fewer` has not.
    fn beyond(self, fewer: &Calls) -> Calls {
        let mut by_kernel = self.by_kernel;
        for (kernel, count) in &fewer.by_kernel {
            *by_kernel.entry(kernel.clone()).or_default() -= count;
        }
        by_kernel.retain(|_, count| *count != 0);
        Calls {
            kernels: self.kernels - fewer.kernels,
            products: self.products - fewer.products,
            by_kernel,
        }
    }
}

/// The shapes of `size`, as narrow as all of its paths are still taken.
fn narrow(size: ModelSize, blocks: usize) -> ModelConfig {
    let config = size.config();
    ModelConfig {
        num_layers: blocks,
        hidden_size: 256,
        inner_hidden_size: 512,
        num_attention_heads: 2,
        num_key_value_heads: config.num_key_value_heads.min(2),
        head_dim: 128,
        vocab_size: 520,
        tie_word_embeddings: true,
        context_ids: None,
        ..config
    }
}

fn adapters() -> [(&'static str, AdapterSection); 4] {
    let lora = |target: &str| {
        AdapterSection::Lora(LoraSection {
            r: 8,
            lora_alpha: 32.0,
            lora_dropout: 0.0,
            target_modules: vec![target.to_owned()],
            init_adapter: None,
        })
    };
    let prefix = AdapterSection::Prefix(PrefixSection {
        pre_seq_len: 32,
        prefix_projection: false,
        prefix_dropout: 0.0,
        init_adapter: None,
    });
    [
        ("LoRA r=8 at query_key_value", lora("query_key_value")),
        ("LoRA r=8 at all linear layers", lora("all-linear")),
        ("P-Tuning v2", prefix),
        ("full", AdapterSection::Full(FullSection {})),
    ]
}

/// As `trace`, which the emulator writes, has them.
pub fn block_launches(trace: &Path) -> BlockLaunches {
    let cuda = Cuda::new(0).unwrap();
    let mut blocks = Vec::new();
    for size in [ModelSize::ChatGlm6b, ModelSize::ChatGlm2_6b] {
        for (adapter, section) in adapters() {
            let of = |blocks| pass(&cuda, size, blocks, &section, trace);
            let ([forward, backward], fewer) = (of(3), of(2));
            let [forward, backward] = [forward.beyond(&fewer[0]), backward.beyond(&fewer[1])];
            blocks.push(OfBlock {
                model: size.name(),
                adapter,
                forward,
                backward,
            });
        }
    }
    BlockLaunches {
        arch: ARCH,
        rows: ROWS,
        hidden_size: narrow(ModelSize::ChatGlm6b, 2).hidden_size,
        blocks,
    }
}

/// Calls of the forward and of the backward pass of a whole model.
fn pass(
    cuda: &Cuda,
    size: ModelSize,
    blocks: usize,
    adapter: &AdapterSection,
    trace: &Path,
) -> [Calls; 2] {
    let config = narrow(size, blocks);
    let source = SyntheticTensors::new(weights::own_tensors(&config, true), SEED);
    let head_source = weights::check(&source, &config).unwrap();
    let trainables = Trainables::new(&config, adapter, true).unwrap();
    let loader = Loader {
        backend: cuda,
        source: &source,
        config: &config,
        trainables: &trainables,
        initial: &|spec| {
            Ok(match initial_values(spec, SEED) {
                Some(values) => ParameterState::fresh(values),
                None => ParameterState::of_base(),
            })
        },
        pulse: &Arc::default(),
        first_stage: true,
        sums: Sums::F32,
    };
    let shape = StageShape {
        chunks: vec![ChunkShape {
            blocks: 0..blocks,
            slots: 1,
        }],
        embedding: true,
        head: true,
        max_rows: ROWS,
        max_sequences: 1,
        recompute: Recompute::None,
        rotary: RotaryPrecision::F32,
    };
    let mut stage = Stage::load(&loader, shape, &head_source).unwrap();
    let ids: Vec<u32> = (0..ROWS as u32).collect();
    let targets: Vec<u32> = (ROWS as u32 / 2..ROWS as u32).collect();
    let span = Span {
        q_start: 0,
        q_len: ROWS,
        kv_start: 0,
        kv_len: ROWS,
        context_length: ROWS / 2,
    };
    let rows = BatchRows {
        input_ids: &ids,
        position: &ids,
        block_position: &vec![0; ROWS],
        spans: &[span],
        target_rows: &targets,
        target_ids: &targets,
        cache_rows: &[],
        noise: None,
    };
    stage.fill(cuda, 0, 0, rows).unwrap();
    stage.begin_step(cuda).unwrap();
    let forward = calls(cuda, trace, || stage.forward(cuda, 0, 0, None).unwrap());
    stage.loss(cuda, 0, 1.0 / targets.len() as f32).unwrap();
    let backward = calls(cuda, trace, || stage.backward(cuda, 0, 0).unwrap());
    [forward, backward]
}

fn calls(cuda: &Cuda, trace: &Path, work: impl FnOnce()) -> Calls {
    settle(cuda);
    let before = std::fs::read_to_string(trace).unwrap().len();
    work();
    settle(cuda);
    let traced = std::fs::read_to_string(trace).unwrap();
    let mut calls = Calls {
        kernels: 0,
        products: 0,
        by_kernel: BTreeMap::new(),
    };
    for line in traced[before..].lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        match event["event"].as_str() {
            Some("launch") => {
                calls.kernels += 1;
                let kernel = event["kernel"].as_str().unwrap().to_owned();
                *calls.by_kernel.entry(kernel).or_default() += 1;
            }
            Some("products") => calls.products += 1,
            _ => {}
        }
    }
    calls
}

/// What the rest of the tests counts on: work that is done in one pass with another's is no launch.
pub fn check(record: &BlockLaunches) {
    assert_eq!(record.blocks.len(), 8);
    for block in &record.blocks {
        let (model, adapter) = (block.model, block.adapter);
        for calls in [&block.forward, &block.backward] {
            let counted: i64 = calls.by_kernel.values().sum();
            assert_eq!(counted, calls.kernels, "{model}, {adapter}");
            assert!(calls.by_kernel.values().all(|&count| count > 0));
        }
        // Four layers, each of which is one product forward, and one backward for its input.
        assert_eq!(block.forward.products, 4, "{model}, {adapter}");
        let of_weights = if adapter == "full" { 4 } else { 0 };
        let backward = block.backward.products;
        assert_eq!(backward, 4 + of_weights, "{model}, {adapter}");
    }
}
