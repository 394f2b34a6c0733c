//! Which tensors a run trains, in the one order that every stage and file agrees on.

use std::ops::Range;

use super::weights::{self, LinearSite};
use super::{ModelError, quantised};
use crate::adapter::prefix::PrefixShape;
use crate::adapter::{ParameterSpec, Role, Slice};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, Quantization};

/// Lead of LoRA names in PEFT's files.
const PEFT_LEAD: &str = "base_model.model";
/// Lead of prefix names in THUDM's files.
const PREFIX_LEAD: &str = "transformer.prefix_encoder";

/// All trainable tensors of a run.
#[derive(Clone, Debug)]
pub struct Trainables {
    /// What is trained; nothing in a model that only answers.
    pub adapter: Option<AdapterSection>,
    /// Whether embedding and lm_head are one matrix.
    pub tied: bool,
    specs: Vec<ParameterSpec>,
}

/// Name of a LoRA matrix in PEFT's files; `matrix` is `lora_A` or `lora_B`.
pub fn lora_name(site: LinearSite, layer: usize, matrix: &str) -> String {
    format!("{PEFT_LEAD}.{}.{matrix}.weight", site.module(layer))
}

/// Name of a tensor of the prefix encoder.
pub fn prefix_name(tensor: &str) -> String {
    format!("{PREFIX_LEAD}.{tensor}")
}

/// Sizes of the prefix of this model.
pub fn prefix_shape(config: &ModelConfig, pre_seq_len: usize) -> PrefixShape {
    PrefixShape {
        len: pre_seq_len,
        hidden_size: config.hidden_size,
        width: 2 * config.hidden_size,
    }
}

impl Trainables {
    /// The trainable tensors of `adapter` on a model.
    ///
    /// # Errors
    /// A LoRA target that the model does not have, or a quantised model trained as a whole.
    pub fn new(
        config: &ModelConfig,
        adapter: &AdapterSection,
        tied: bool,
    ) -> Result<Self, ModelError> {
        let specs = match adapter {
            AdapterSection::Lora(lora) => lora_specs(config, lora.r, &lora.target_modules)?,
            AdapterSection::Prefix(prefix) => {
                let shape = prefix_shape(config, prefix.pre_seq_len);
                prefix_specs(config.num_layers, shape, prefix.prefix_projection)
            }
            AdapterSection::Full(_) if config.quantization != Quantization::None => {
                return Err(ModelError::TrainedCodes {
                    found: quantised::word(config.quantization),
                });
            }
            AdapterSection::Full(_) => base_specs(config, tied),
        };
        Ok(Trainables {
            adapter: Some(adapter.clone()),
            tied,
            specs,
        })
    }

    /// Nothing is trained: the base model alone.
    pub fn none(tied: bool) -> Self {
        Trainables {
            adapter: None,
            tied,
            specs: Vec::new(),
        }
    }

    /// All of them, in order.
    pub fn specs(&self) -> &[ParameterSpec] {
        &self.specs
    }

    /// Place and spec of the tensor `name`, or of the part of it that starts at `start`.
    pub fn find(&self, name: &str, start: Option<usize>) -> Option<(usize, &ParameterSpec)> {
        let start_of = |spec: &ParameterSpec| spec.slice.map(|slice| slice.start);
        self.specs
            .iter()
            .enumerate()
            .find(|(_, spec)| spec.name == name && start_of(spec) == start)
    }

    /// Whether the model's own tensors are trained.
    pub fn is_full(&self) -> bool {
        matches!(self.adapter, Some(AdapterSection::Full(_)))
    }

    /// Numbers trained.
    pub fn count(&self) -> usize {
        self.specs.iter().map(ParameterSpec::len).sum()
    }
}

/// The sites that `target_modules` names.
///
/// # Errors
/// A name that is none of them.
pub fn targets(target_modules: &[String]) -> Result<Vec<LinearSite>, ModelError> {
    for name in target_modules {
        if !LinearSite::ALL.iter().any(|site| site.target() == name) {
            return Err(ModelError::UnknownTarget {
                name: name.clone(),
                known: LinearSite::ALL.map(LinearSite::target).join(", "),
            });
        }
    }
    let wanted = |site: &LinearSite| target_modules.iter().any(|name| name == site.target());
    Ok(LinearSite::ALL.into_iter().filter(wanted).collect())
}

fn lora_specs(
    config: &ModelConfig,
    rank: usize,
    target_modules: &[String],
) -> Result<Vec<ParameterSpec>, ModelError> {
    let targets = targets(target_modules)?;
    let mut specs = Vec::new();
    for layer in 0..config.num_layers {
        for &site in &targets {
            let (in_features, out_features) = site.features(config);
            for (matrix, role, shape) in [
                ("lora_A", Role::LoraA, vec![rank, in_features]),
                ("lora_B", Role::LoraB, vec![out_features, rank]),
            ] {
                specs.push(ParameterSpec {
                    name: lora_name(site, layer, matrix),
                    shape,
                    slice: None,
                    decay: true,
                    role,
                });
            }
        }
    }
    Ok(specs)
}

/// The part of a prefix tensor that belongs to block `layer`.
pub fn prefix_part(shape: PrefixShape, layer: usize) -> Range<usize> {
    layer * shape.width..(layer + 1) * shape.width
}

fn prefix_specs(layers: usize, prefix: PrefixShape, projection: bool) -> Vec<ParameterSpec> {
    let spec = |tensor: &str, shape: Vec<usize>, part: Option<(usize, usize)>, role| {
        let slice = part.map(|(axis, layer)| Slice {
            axis,
            start: prefix_part(prefix, layer).start,
            len: prefix.width,
        });
        ParameterSpec {
            name: prefix_name(tensor),
            shape,
            slice,
            decay: !tensor.ends_with("bias"),
            role,
        }
    };
    let (hidden, all) = (prefix.hidden_size, layers * prefix.width);
    if !projection {
        let role = Role::PrefixEmbedding;
        return (0..layers)
            .map(|layer| {
                spec(
                    "embedding.weight",
                    vec![prefix.len, all],
                    Some((1, layer)),
                    role,
                )
            })
            .collect();
    }
    let role = Role::PrefixProjection {
        in_features: hidden,
    };
    let mut specs = vec![
        spec(
            "embedding.weight",
            vec![prefix.len, hidden],
            None,
            Role::PrefixEmbedding,
        ),
        spec("trans.0.weight", vec![hidden, hidden], None, role),
        spec("trans.0.bias", vec![hidden], None, role),
    ];
    for layer in 0..layers {
        specs.push(spec(
            "trans.2.weight",
            vec![all, hidden],
            Some((0, layer)),
            role,
        ));
        specs.push(spec("trans.2.bias", vec![all], Some((0, layer)), role));
    }
    specs
}

fn base_specs(config: &ModelConfig, tied: bool) -> Vec<ParameterSpec> {
    weights::model_tensors(config)
        .into_iter()
        .filter(|(name, _)| !(tied && name == weights::LM_HEAD))
        .map(|(name, shape)| ParameterSpec {
            decay: !name.ends_with(".bias") && !name.contains("layernorm"),
            name,
            shape,
            slice: None,
            role: Role::Base,
        })
        .collect()
}
