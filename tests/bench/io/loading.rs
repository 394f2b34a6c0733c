//! From a safetensors file in the system's cache to the stages of a model.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::{Advice, MmapMut};
use mp_train::adapter::ParameterState;
use mp_train::adapter::initial::initial_values;
use mp_train::backend::cpu::Cpu;
use mp_train::backend::{Backend, Element, Sums};
use mp_train::checkpoint::safetensors::{PlannedTensor, SafetensorsFile, stream_safetensors};
use mp_train::checkpoint::synthetic::SyntheticTensors;
use mp_train::checkpoint::{CheckpointError, Dtype, OpenTensor, TensorSource};
use mp_train::config::model::ModelConfig;
use mp_train::config::model_size::ModelSize;
use mp_train::config::run::{AdapterSection, LoraSection, Quantization, Recompute};
use mp_train::model::load::Loader;
use mp_train::model::rotary::RotaryPrecision;
use mp_train::model::stage::{ChunkShape, Stage, StageShape};
use mp_train::model::trainables::Trainables;
use mp_train::model::weights;

use crate::figures::{Case, Report, seconds};

const PIECE: usize = 1 << 20;

/// 12 blocks of 2,048 and a vocabulary of 65,536: 1.48 GB in half precision.
pub fn model() -> ModelConfig {
    ModelConfig {
        num_layers: 12,
        hidden_size: 2_048,
        inner_hidden_size: 8_192,
        head_dim: 128,
        vocab_size: 65_536,
        ..ModelSize::Small.config()
    }
}

/// Writes random weights of a model.
pub fn write_model(path: &Path, config: &ModelConfig) {
    let shapes = weights::own_tensors(config, config.tie_word_embeddings);
    let planned = |(name, shape): &(String, Vec<usize>)| PlannedTensor {
        name: name.clone(),
        dtype: Dtype::F16,
        shape: shape.clone(),
    };
    let planned = shapes.iter().map(planned).collect();
    let source = SyntheticTensors::new(shapes, 1);
    stream_safetensors::<CheckpointError>(path, planned, |tensor, sink| {
        let open = source.open(&tensor.name)?;
        let mut room = vec![f16::ZERO; PIECE];
        for start in (0..open.element_count()).step_by(PIECE) {
            let room = &mut room[..PIECE.min(open.element_count() - start)];
            open.read_f16(start, room)?;
            sink.write(bytemuck::cast_slice(room))?;
        }
        Ok(())
    })
    .unwrap();
}

fn lora() -> AdapterSection {
    AdapterSection::Lora(LoraSection {
        r: 8,
        lora_alpha: 32.0,
        lora_dropout: 0.0,
        target_modules: vec!["query_key_value".to_owned()],
        init_adapter: None,
    })
}

/// Loads some of the blocks, as a stage that has both ends.
fn load<E: Element>(
    source: &dyn TensorSource,
    quantization: Quantization,
    threads: usize,
    blocks: std::ops::Range<usize>,
) -> f64
where
    Cpu<E>: Backend<Element = E>,
{
    let stored = model();
    let config = ModelConfig {
        quantization,
        ..stored.clone()
    };
    let head_source = weights::check(source, &stored).unwrap();
    let trainables = Trainables::new(&config, &lora(), head_source.tied).unwrap();
    let backend = Cpu::<E>::new(threads).unwrap();
    let initial = |spec: &_| Ok(ParameterState::fresh(initial_values(spec, 1).unwrap()));
    let loader = Loader {
        backend: &backend,
        source,
        config: &config,
        trainables: &trainables,
        initial: &initial,
        pulse: &Arc::default(),
        first_stage: true,
        sums: Sums::F32,
    };
    let shape = StageShape {
        chunks: vec![ChunkShape { blocks, slots: 1 }],
        embedding: true,
        head: true,
        max_rows: 1,
        max_sequences: 1,
        recompute: Recompute::None,
        rotary: RotaryPrecision::F32,
    };
    seconds(|| Stage::load(&loader, shape, &head_source).unwrap())
}

/// Reads the whole file by position on so many threads, and does nothing with it.
fn copy(file: &File, out: &mut [u8], threads: usize) {
    let pieces: Vec<(usize, &mut [u8])> = out.chunks_mut(PIECE).enumerate().collect();
    let pieces = std::sync::Mutex::new(pieces.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let next = pieces.lock().unwrap().next();
                    let Some((index, piece)) = next else { break };
                    file.read_exact_at(piece, (index * PIECE) as u64).unwrap();
                }
            });
        }
    });
}

pub fn stages(report: &mut Report, folder: &Path) {
    let path = folder.join("model.safetensors");
    write_model(&path, &model());
    let file = File::open(&path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    let source = SafetensorsFile::open(&path).unwrap();
    let mut touched = vec![1_u8; len];
    let touched = std::cell::RefCell::new(&mut touched);
    let (file, source, touched) = (&file, &source, &touched);
    let layers = model().num_layers;
    let mut cases: Vec<Case<'_>> = Vec::new();
    let mut add = |name: String, case: Box<dyn FnMut() -> f64>| cases.push((name, case));
    let mut counts = vec![1, report.threads];
    counts.dedup();
    for threads in counts {
        let named = |what: &str| format!("{what}, threads: {threads}");
        add(
            named("copy of the file into memory used before"),
            Box::new(move || seconds(|| copy(file, &mut touched.borrow_mut(), threads))),
        );
        add(
            named("copy of the file into new memory"),
            Box::new(move || {
                seconds(|| {
                    let mut new = vec![0; len];
                    copy(file, &mut new, threads);
                    new
                })
            }),
        );
        for (what, advice) in [
            ("huge pages", Advice::HugePage),
            ("pages taken at once", Advice::PopulateWrite),
        ] {
            // What the system refuses is copied all the same, and shows in the seconds.
            add(
                named(&format!("copy of the file into new memory, {what}")),
                Box::new(move || {
                    seconds(|| {
                        let mut new = MmapMut::map_anon(len).unwrap();
                        let _ = new.advise(advice);
                        copy(file, &mut new, threads);
                        new
                    })
                }),
            );
        }
        add(
            named("stage in f16"),
            Box::new(move || load::<f16>(source, Quantization::None, threads, 0..layers)),
        );
        add(
            named("stage in f32"),
            Box::new(move || load::<f32>(source, Quantization::None, threads, 0..layers)),
        );
        add(
            named("stage quantised to int8"),
            Box::new(move || load::<f16>(source, Quantization::Int8, threads, 0..layers)),
        );
        add(
            named("stage quantised to int4"),
            Box::new(move || load::<f16>(source, Quantization::Int4, threads, 0..layers)),
        );
    }
    report.in_turn("loading", len as f64 / 1e9, "GB of the file", cases);
}

/// Values converted on one thread, out of memory and into memory that stay in the caches.
pub fn conversions(report: &mut Report) {
    const COUNT: usize = 1 << 19;
    const TIMES: usize = 400;
    let value = |i: usize| ((i * 2_654_435_761) % 60_000) as f32 * 1.7e-3 - 51.0;
    let wide: Vec<f32> = (0..COUNT).map(value).collect();
    let halves: Vec<f16> = wide.iter().copied().map(f16::from_f32).collect();
    let brains: Vec<bf16> = wide.iter().copied().map(bf16::from_f32).collect();
    let tensor = |dtype, bytes: &[u8]| OpenTensor::new(dtype, vec![COUNT], bytes.to_vec()).unwrap();
    let sources = [
        ("f16", tensor(Dtype::F16, bytemuck::cast_slice(&halves))),
        ("bf16", tensor(Dtype::Bf16, bytemuck::cast_slice(&brains))),
        ("f32", tensor(Dtype::F32, bytemuck::cast_slice(&wide))),
    ];
    let mut cases: Vec<Case<'_>> = Vec::new();
    for (name, source) in &sources {
        let mut out = vec![f16::ZERO; COUNT];
        let work =
            move || seconds(|| (0..TIMES).for_each(|_| source.read_f16(0, &mut out).unwrap()));
        cases.push((format!("{name} to f16"), Box::new(work)));
        let mut out = vec![0.0_f32; COUNT];
        let work =
            move || seconds(|| (0..TIMES).for_each(|_| source.read_f32(0, &mut out).unwrap()));
        cases.push((format!("{name} to f32"), Box::new(work)));
    }
    for bits in [mp_train::quant::Bits::Eight, mp_train::quant::Bits::Four] {
        let (rows, cols) = (128, COUNT / 128);
        let mut codes = vec![0; bits.row_bytes(cols)];
        let halves = &halves;
        let work = move || {
            seconds(|| {
                for row in (0..rows).cycle().take(rows * TIMES / 4) {
                    let weights = &halves[row * cols..(row + 1) * cols];
                    mp_train::quant::quantise_row(&mut codes, weights, bits).unwrap();
                }
            }) * 4.0
        };
        cases.push((format!("f16 to codes of {bits:?} bits"), Box::new(work)));
    }
    let amount = (COUNT * TIMES) as f64 / 1e9;
    report.in_turn("conversions on one thread", amount, "billion values", cases);
}
