//! The whole model on one stage, without the pipeline around it.

use std::sync::Arc;

use mp_train::checkpoint::TensorSource;
use mp_train::comm::in_process;
use mp_train::config::model::ModelConfig;
use mp_train::config::run::{Quantization, Recompute};
use mp_train::data::batch::MicroBatch;
use mp_train::model::batch::BatchRows;
use mp_train::model::load::{Loader, sums};
use mp_train::model::rotary::RotaryPrecision;
use mp_train::model::stage::{ChunkShape, Stage, StageShape};
use mp_train::model::weights::HeadSource;
use mp_train::pipeline::gradients;

use super::adapter::Adapter;
use super::batch::spans;
use super::case::Family;
use super::{Golden, Outcome};
use mp_train::backend::Backend;

/// The whole model on one stage.
pub struct Single<B: Backend> {
    pub backend: B,
    pub stage: Stage<B>,
    layers: usize,
}

/// What the model is made from.
pub struct Parts<'a> {
    pub family: &'a Family,
    /// The model's configuration; `quantization` says how the linear layers are held.
    pub config: ModelConfig,
    pub source: Arc<dyn TensorSource>,
    pub head_source: HeadSource,
    pub adapter: &'a Adapter,
}

impl<'a> Parts<'a> {
    /// The family's model as it is.
    pub fn new(family: &'a Family, adapter: &'a Adapter) -> Parts<'a> {
        Parts {
            family,
            config: family.config.clone(),
            source: Arc::clone(&family.model),
            head_source: family.head_source.clone(),
            adapter,
        }
    }

    /// The same model from other tensors, held so.
    pub fn held(self, source: &Arc<dyn TensorSource>, quantization: Quantization) -> Parts<'a> {
        Parts {
            source: Arc::clone(source),
            config: ModelConfig {
                quantization,
                ..self.config
            },
            ..self
        }
    }
}

impl<B: Golden> Single<B> {
    /// Loads the model with room for one micro-batch.
    pub fn load(parts: &Parts<'_>, micro: &MicroBatch) -> Outcome<Single<B>> {
        let config = &parts.config;
        let trainables = parts.adapter.trainables(config, parts.head_source.tied)?;
        let backend = B::open(1)?;
        let initial = |spec: &_| parts.adapter.initial(spec);
        let loader = Loader {
            backend: &backend,
            source: parts.source.as_ref(),
            config,
            trainables: &trainables,
            initial: &initial,
            pulse: &Arc::default(),
            first_stage: true,
            sums: sums(parts.family.product_sums),
        };
        let shape = StageShape {
            chunks: vec![ChunkShape {
                blocks: 0..config.num_layers,
                slots: 1,
            }],
            embedding: true,
            head: true,
            max_rows: micro.tokens(),
            max_sequences: micro.sequences.len(),
            recompute: Recompute::None,
            rotary: RotaryPrecision::F32,
        };
        let stage = Stage::load(&loader, shape, &parts.head_source)?;
        Ok(Single {
            backend,
            stage,
            layers: config.num_layers,
        })
    }

    /// Forward of a micro-batch, with gradients cleared and the prefix computed.
    pub fn forward(&mut self, micro: &MicroBatch) -> Outcome<()> {
        let Single { backend, stage, .. } = self;
        let target_rows: Vec<u32> = micro.targets.iter().map(|target| target.row).collect();
        let target_ids: Vec<u32> = micro.targets.iter().map(|target| target.id).collect();
        let rows = BatchRows {
            input_ids: &micro.input_ids,
            position: &micro.position,
            block_position: &micro.block_position,
            spans: &spans(micro),
            target_rows: &target_rows,
            target_ids: &target_ids,
            cache_rows: &[],
            noise: None,
        };
        stage.begin_step(backend)?;
        stage.fill(backend, 0, 0, rows)?;
        Ok(stage.forward(backend, 0, 0, None)?)
    }

    /// The mean loss of the micro-batch and its gradient at the last block, times the backend's loss
    /// scale.
    pub fn loss(&mut self, micro: &MicroBatch) -> Outcome<()> {
        let Single { backend, stage, .. } = self;
        Ok(stage.loss(backend, 0, B::loss_scale() / micro.targets.len() as f32)?)
    }

    /// Backward, up to gradients that need nothing more.
    pub fn backward(&mut self) -> Outcome<()> {
        let Single { backend, stage, .. } = self;
        stage.backward(backend, 0, 0)?;
        let alone = &mut in_process::connect(1)[0];
        Ok(gradients::complete(stage, backend, alone, self.layers)?)
    }
}
