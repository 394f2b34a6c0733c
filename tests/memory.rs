//! The memory that is planned for a stage from configuration alone is the memory that the stage takes.
#![allow(clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;

use half::f16;
use mp_train::adapter::{ParameterSpec, ParameterState, Role};
use mp_train::backend::cpu::Cpu;
use mp_train::backend::{Backend, Element, Sums};
use mp_train::checkpoint::{
    CheckpointError, Dtype, HostTensor, OpenTensor, TensorInfo, TensorSource,
};
use mp_train::comm::{Flow, Mailbox};
use mp_train::config::architecture::{Architecture, Naming};
use mp_train::config::model::ModelConfig;
use mp_train::config::model_size::ModelSize;
use mp_train::config::run::{
    AdapterSection, FullSection, LoraSection, PrefixSection, Quantization, Recompute,
};
use mp_train::model::load::Loader;
use mp_train::model::memory::{StageSizes, stage_buffers};
use mp_train::model::names::Names;
use mp_train::model::rotary::RotaryPrecision;
use mp_train::model::stage::{ChunkShape, Stage, StageShape};
use mp_train::model::trainables::Trainables;
use mp_train::model::weights;
use mp_train::pipeline::gradients::Agreement;

thread_local! {
    /// Bytes that this thread has allocated and not given back: the test runner's own thread, which
    /// works beside the test's, does not count.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    /// The most bytes that it gave back at once.
    static LARGEST_FREED: Cell<usize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // Fails only while a thread ends, when nobody measures any more.
    let _ = LIVE.try_with(|live| live.set(live.get() + bytes));
}

fn freed(bytes: usize) {
    count(-(bytes as isize));
    let _ = LARGEST_FREED.try_with(|largest| largest.set(largest.get().max(bytes)));
}

struct Counting;

// SAFETY: every call is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        freed(layout.size());
        // SAFETY: `pointer` came from `System` with this layout, by `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Names, shapes and lists of buffers, which are not planned.
const METADATA: u64 = 40_000;

/// What the tensors of [`Zeros`] lie in, as in a file that is mapped.
static ZEROS: [u8; 500_000] = [0; 500_000];
static HEAD: [u8; 500_000] = [1; 500_000];

/// All the tensors of a model, as zeros.
struct Zeros(Vec<(String, Vec<usize>)>);

impl TensorSource for Zeros {
    fn names(&self) -> Vec<String> {
        self.0.iter().map(|(name, _)| name.clone()).collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (_, shape) = self.0.iter().find(|(known, _)| known == name)?;
        Some(TensorInfo {
            dtype: Dtype::F16,
            shape: shape.clone(),
            file: PathBuf::from("zeros"),
        })
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        panic!("{name} is taken into memory as a whole");
    }

    fn open(&self, name: &str) -> Result<OpenTensor<'_>, CheckpointError> {
        let shape = self.info(name).unwrap().shape;
        // Not all alike: equal matrices of embedding and head would become one.
        let file = match name.ends_with("lm_head.weight") || name.ends_with("output_layer.weight") {
            true => &HEAD,
            false => &ZEROS,
        };
        let len = Dtype::F16.bytes_of(&shape).unwrap();
        OpenTensor::new(Dtype::F16, shape, &file[..len])
    }
}

/// The models that are measured: layer norms and GELU; a gate, shared keys and values and heads wider than
/// the stream, with queries, keys and values in one layer and in layers of their own.
fn models() -> [ModelConfig; 3] {
    let later = |naming| ModelConfig {
        architecture: Architecture {
            naming,
            ..ModelSize::ChatGlm2_6b.config().architecture
        },
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 128,
        context_ids: None,
        ..model()
    };
    [model(), later(Naming::ChatGlm2), later(Naming::Glm)]
}

fn model() -> ModelConfig {
    ModelConfig {
        num_layers: 3,
        hidden_size: 160,
        num_attention_heads: 5,
        num_key_value_heads: 5,
        head_dim: 32,
        inner_hidden_size: 480,
        vocab_size: 1_009,
        max_sequence_length: 257,
        ..golden_config()
    }
}

fn golden_config() -> ModelConfig {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b");
    ModelConfig::from_json_file(&folder.join("model/config.json")).unwrap()
}

fn lora(lora_dropout: f32, target_modules: &[&str]) -> AdapterSection {
    AdapterSection::Lora(LoraSection {
        r: 5,
        lora_alpha: 32.0,
        lora_dropout,
        target_modules: target_modules.iter().map(|&name| name.to_owned()).collect(),
        init_adapter: None,
    })
}

fn prefix(prefix_projection: bool) -> AdapterSection {
    AdapterSection::Prefix(PrefixSection {
        pre_seq_len: 9,
        prefix_projection,
        prefix_dropout: 0.1,
        init_adapter: None,
    })
}

/// Rank, number of stages, and chunks: first block, the one behind the last, slots.
type Place = (usize, usize, &'static [(usize, usize, usize)]);

/// Stages of three blocks: one, the first or the last of two, or one of two with a chunk at either end.
const STAGES: [Place; 4] = [
    (0, 1, &[(0, 3, 2)]),
    (0, 2, &[(0, 2, 2)]),
    (1, 2, &[(2, 3, 1)]),
    (1, 2, &[(0, 1, 3), (2, 3, 2)]),
];

fn sizes<E: Element>((rank, stages, chunks): Place, rows: usize) -> StageSizes {
    let chunk = |&(start, end, slots): &(usize, usize, usize)| ChunkShape {
        blocks: start..end,
        slots,
    };
    StageSizes {
        chunks: chunks.iter().map(chunk).collect(),
        exchanges: stages > 1,
        embedding: rank == 0,
        head: rank + 1 == stages,
        max_rows: rows,
        max_sequences: 4,
        micro_batches: 8,
        element_size: E::SIZE,
    }
}

/// What loading a stage took.
struct Measured {
    /// Bytes that are allocated for the stage and its worker, and stay.
    stay: u64,
    /// Bytes of the largest thing that was made and given back meanwhile.
    largest_beside: usize,
}

fn measured<E: Element>(
    config: &ModelConfig,
    trainables: &Trainables,
    sizes: &StageSizes,
    recompute: Recompute,
    tied: bool,
) -> Measured
where
    Cpu<E>: Backend<Element = E>,
{
    let source = Zeros(weights::model_tensors(config));
    let stored = ModelConfig {
        tie_word_embeddings: tied,
        quantization: Quantization::None,
        ..config.clone()
    };
    let head_source = weights::check(&source, &stored).unwrap();
    let backend = Cpu::<E>::new(1).unwrap();
    let initial = |spec: &ParameterSpec| {
        Ok(match spec.role {
            Role::Base => ParameterState::of_base(),
            _ => ParameterState::fresh(vec![0.0; spec.len()]),
        })
    };
    let loader = Loader {
        backend: &backend,
        source: &source,
        config,
        trainables,
        initial: &initial,
        pulse: &Arc::default(),
        first_stage: sizes.embedding,
        sums: Sums::F32,
    };
    let shape = StageShape {
        chunks: sizes.chunks.clone(),
        embedding: sizes.embedding,
        head: sizes.head,
        max_rows: sizes.max_rows,
        max_sequences: sizes.max_sequences,
        recompute,
        rotary: RotaryPrecision::F32,
    };
    let before = LIVE.get();
    LARGEST_FREED.set(0);
    let stage = Stage::load(&loader, shape, &head_source).unwrap();
    let parameters = trainables.specs().len();
    let agreement = Agreement::new(&backend, parameters, sizes.micro_batches).unwrap();
    let largest = match sizes.exchanges {
        true => stage.largest_activation(),
        false => 0,
    };
    let activations = Mailbox::<_, f32>::new(&backend, Flow::Forward, largest).unwrap();
    let gradients = Mailbox::<_, E>::new(&backend, Flow::Backward, largest).unwrap();
    let (after, largest_beside) = (LIVE.get(), LARGEST_FREED.get());
    drop((stage, agreement, activations, gradients));
    Measured {
        stay: (after - before) as u64,
        largest_beside,
    }
}

fn planned_is_measured<E: Element>()
where
    Cpu<E>: Backend<Element = E>,
{
    let adapters = [
        lora(0.0, &["query_key_value"]),
        lora(0.2, &["all-linear"]),
        prefix(false),
        prefix(true),
        AdapterSection::Full(FullSection {}),
    ];
    let bases = [Quantization::None, Quantization::Int8, Quantization::Int4];
    let all = adapters.iter().flat_map(|adapter| {
        bases
            .into_iter()
            .flat_map(move |base| [(adapter, false, base), (adapter, true, base)])
    });
    let models = models();
    let all = all.flat_map(|case| models.iter().map(move |model| (case, model)));
    for ((adapter, tied, quantization), model) in all {
        let config = ModelConfig {
            quantization,
            ..model.clone()
        };
        let Ok(trainables) = Trainables::new(&config, adapter, tied) else {
            match adapter {
                AdapterSection::Full(_) => assert_ne!(quantization, Quantization::None),
                _ => assert!(Names::of(&config).prefix_encoder.is_none()),
            }
            continue;
        };
        for stage in STAGES {
            for recompute in [Recompute::None, Recompute::AttentionFree, Recompute::Block] {
                let what = format!(
                    "{:?} {} {stage:?}, {recompute:?}, tied {tied}, {quantization:?}, {adapter:?}",
                    config.architecture.naming,
                    E::NAME
                );
                let both = [61, 331].map(|rows| {
                    let sizes = sizes::<E>(stage, rows);
                    let buffers = stage_buffers(&config, &trainables, &sizes, recompute);
                    let planned = buffers.total(1);
                    let measured =
                        measured::<E>(&config, &trainables, &sizes, recompute, tied).stay;
                    assert!(
                        (planned..planned + METADATA).contains(&measured),
                        "{what}: planned {planned}, measured {measured}"
                    );
                    (planned, measured)
                });
                // Metadata does not depend on the number of rows, so here every byte must agree.
                let [(planned, measured), (planned_more, measured_more)] = both;
                let (planned, measured) = (planned_more - planned, measured_more - measured);
                assert_eq!(planned, measured, "{what}: for 270 rows more");
            }
        }
    }
}

#[test]
fn planned_bytes_are_those_that_a_stage_takes() {
    planned_is_measured::<f32>();
    planned_is_measured::<f16>();
    loading_makes_no_copy_of_a_tensor::<f32>();
    loading_makes_no_copy_of_a_tensor::<f16>();
}

/// One row of weights on its way to codes, scales, a LoRA's values, rotary tables: nothing half as
/// large as the smallest matrix in its file is ever made beside the stage.
fn loading_makes_no_copy_of_a_tensor<E: Element>()
where
    Cpu<E>: Backend<Element = E>,
{
    const LITTLE: usize = 20_000;
    let smallest = 2 * model().hidden_size * model().hidden_size;
    assert!(2 * LITTLE < smallest, "a copy would not be seen");
    for (adapter, quantization) in [
        (lora(0.0, &["dense"]), Quantization::None),
        (lora(0.0, &["dense"]), Quantization::Int8),
        (lora(0.0, &["dense"]), Quantization::Int4),
        (AdapterSection::Full(FullSection {}), Quantization::None),
    ] {
        let config = ModelConfig {
            quantization,
            ..model()
        };
        let trainables = Trainables::new(&config, &adapter, false).unwrap();
        let sizes = sizes::<E>(STAGES[0], 61);
        let largest =
            measured::<E>(&config, &trainables, &sizes, Recompute::None, false).largest_beside;
        let what = format!("{} {quantization:?} {adapter:?}", E::NAME);
        println!("{what}: {largest} bytes at once");
        assert!(largest <= LITTLE, "{what}: {largest}");
    }
}
