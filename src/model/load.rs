//! From tensors in files to the layers of a stage.

use std::sync::Arc;

use super::ModelError;
use super::attention::Attention;
use super::block::Block;
use super::linear::{Linear, Weight};
use super::mlp::Mlp;
use super::norm::LayerNorm;
use super::trainables::{self, Trainables};
use super::weights::{LinearSite, NormSite};
use crate::adapter::lora::Lora;
use crate::adapter::prefix::PrefixEncoder;
use crate::adapter::{AdapterError, Parameter, ParameterSpec, ParameterState};
use crate::backend::{AttentionLayout, Backend, Element, Pulse};
use crate::checkpoint::TensorSource;
use crate::config::model::ModelConfig;
use crate::config::run::AdapterSection;

/// Gives a trainable tensor (or its part) its values and moments: from a file, a saved run, or by
/// random numbers.
pub type InitialState<'a> =
    &'a (dyn Fn(&ParameterSpec) -> Result<ParameterState, AdapterError> + Sync);

/// Reads the tensors of one stage.
pub struct Loader<'a, B: Backend> {
    /// The device.
    pub backend: &'a B,
    /// The model's files.
    pub source: &'a dyn TensorSource,
    /// Shape of the model.
    pub config: &'a ModelConfig,
    /// What is trained.
    pub trainables: &'a Trainables,
    /// Values of what is trained.
    pub initial: InitialState<'a>,
    /// Beats with every tensor that is loaded, and with every block that is computed later.
    pub pulse: &'a Arc<Pulse>,
    /// Whether this is the stage that counts parameters held by several stages.
    pub first_stage: bool,
}

impl<B: Backend> Loader<'_, B> {
    /// A tensor of the base model, in the storage type.
    fn frozen(&self, name: &str) -> Result<Weight<B>, ModelError> {
        let values: Vec<B::Element> = self
            .source
            .read(name)?
            .to_f32()?
            .into_iter()
            .map(B::Element::from_f32)
            .collect();
        self.pulse.beat();
        Ok(Weight::Frozen(self.backend.upload(&values)?))
    }

    /// A tensor of the base model: `name` among the trainables, `file_name` in the files.
    pub fn weight(
        &self,
        name: &str,
        file_name: &str,
        counted: bool,
    ) -> Result<Weight<B>, ModelError> {
        match self.trainables.find(name, None) {
            Some(_) if self.trainables.is_full() => {
                let parameter = self.parameter(name, None, counted)?;
                Ok(Weight::Trained(Box::new(parameter)))
            }
            _ => self.frozen(file_name),
        }
    }

    fn parameter(
        &self,
        name: &str,
        start: Option<usize>,
        counted: bool,
    ) -> Result<Parameter<B>, ModelError> {
        let Some((index, spec)) = self.trainables.find(name, start) else {
            return Err(ModelError::MissingTensor {
                name: name.to_owned(),
                count: 1,
            });
        };
        let state = (self.initial)(spec)?;
        self.pulse.beat();
        Ok(Parameter::new(
            self.backend,
            spec.clone(),
            index,
            counted,
            &state,
        )?)
    }

    /// A norm, by its module name.
    pub fn norm(&self, module: &str) -> Result<LayerNorm<B>, ModelError> {
        let tensor = |kind: &str| {
            let name = format!("{module}.{kind}");
            self.weight(&name, &name, true)
        };
        Ok(LayerNorm {
            weight: tensor("weight")?,
            bias: tensor("bias")?,
            hidden_size: self.config.hidden_size,
            eps: self.config.layernorm_epsilon,
        })
    }

    fn linear(&self, site: LinearSite, layer: usize) -> Result<Linear<B>, ModelError> {
        let (in_features, out_features) = site.features(self.config);
        let module = site.module(layer);
        let tensor = |kind: &str| {
            let name = format!("{module}.{kind}");
            self.weight(&name, &name, true)
        };
        let mut linear = Linear {
            site,
            layer,
            in_features,
            out_features,
            weight: tensor("weight")?,
            bias: tensor("bias")?,
            lora: None,
            lora_dropout: 0.0,
        };
        if let Some(AdapterSection::Lora(lora)) = &self.trainables.adapter {
            let a = trainables::lora_name(site, layer, "lora_A");
            if self.trainables.find(&a, None).is_some() {
                let a = self.parameter(&a, None, true)?;
                let b = trainables::lora_name(site, layer, "lora_B");
                let b = self.parameter(&b, None, true)?;
                linear.lora = Some(Lora::new(a, b, lora.r, lora.lora_alpha));
                linear.lora_dropout = lora.lora_dropout;
            }
        }
        Ok(linear)
    }

    /// Block `layer` of the model.
    ///
    /// # Errors
    /// A tensor cannot be read, or the device has no memory for it.
    pub fn block(&self, layer: usize) -> Result<Block<B>, ModelError> {
        let config = self.config;
        Ok(Block {
            norm1: self.norm(&NormSite::Input.module(layer))?,
            attention: Attention {
                query_key_value: self.linear(LinearSite::QueryKeyValue, layer)?,
                dense: self.linear(LinearSite::Dense, layer)?,
                layout: AttentionLayout::grouped_per_head(
                    config.num_attention_heads,
                    config.head_dim(),
                ),
            },
            norm2: self.norm(&NormSite::PostAttention.module(layer))?,
            mlp: Mlp {
                dense_h_to_4h: self.linear(LinearSite::HTo4h, layer)?,
                dense_4h_to_h: self.linear(LinearSite::FourHToH, layer)?,
            },
        })
    }

    /// The prefix of the blocks `layers`, where one is trained.
    ///
    /// # Errors
    /// A tensor cannot be read, or the device has no memory for it.
    pub fn prefix(
        &self,
        layers: impl Iterator<Item = usize>,
    ) -> Result<Option<PrefixEncoder<B>>, ModelError> {
        let Some(AdapterSection::Prefix(prefix)) = &self.trainables.adapter else {
            return Ok(None);
        };
        let shape = trainables::prefix_shape(self.config, prefix.pre_seq_len);
        let part = |tensor: &str, layer: usize| {
            let start = trainables::prefix_part(shape, layer).start;
            self.parameter(&trainables::prefix_name(tensor), Some(start), true)
        };
        let encoder = if prefix.prefix_projection {
            let whole = |tensor: &str| {
                self.parameter(&trainables::prefix_name(tensor), None, self.first_stage)
            };
            let shared = [
                whole("embedding.weight")?,
                whole("trans.0.weight")?,
                whole("trans.0.bias")?,
            ];
            let outputs = layers
                .map(|layer| Ok((part("trans.2.weight", layer)?, part("trans.2.bias", layer)?)))
                .collect::<Result<_, ModelError>>()?;
            PrefixEncoder::projected(self.backend, shape, shared, outputs)?
        } else {
            let embeddings = layers
                .map(|layer| part("embedding.weight", layer))
                .collect::<Result<_, ModelError>>()?;
            PrefixEncoder::plain(self.backend, shape, embeddings)?
        };
        Ok(Some(encoder))
    }
}
