//! Which tensors a run trains, in the one order that every stage and file agrees on.

use std::ops::Range;

use super::names::{LinearSite, Names};
use super::weights;
use super::{ModelError, quantised};
use crate::adapter::prefix::PrefixShape;
use crate::adapter::{ParameterSpec, Role, Slice};
use crate::checkpoint::adapter_files::is_target;
use crate::config::architecture::{Naming, NormKind};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, PrefixSection, Quantization};

/// Lead of LoRA names in PEFT's files.
const PEFT_LEAD: &str = "base_model.model";

/// All trainable tensors of a run.
#[derive(Clone, Debug)]
pub struct Trainables {
    /// What is trained, `target_modules` by the names that this model has; nothing in a model that only
    /// answers.
    pub adapter: Option<AdapterSection>,
    /// Whether embedding and lm_head are one matrix.
    pub tied: bool,
    specs: Vec<ParameterSpec>,
}

/// Name of a LoRA matrix in PEFT's files; `matrix` is `lora_A` or `lora_B`.
pub fn lora_name(names: &Names, site: LinearSite, layer: usize, matrix: &str) -> String {
    format!("{PEFT_LEAD}.{}.{matrix}.weight", names.linear(site, layer))
}

/// Name of a tensor of the prefix encoder in THUDM's files.
pub fn prefix_name(names: &Names, tensor: &str) -> String {
    format!("{}.{tensor}", names.prefix_encoder.unwrap_or_default())
}

/// Sizes of the prefix of this model.
pub fn prefix_shape(config: &ModelConfig, pre_seq_len: usize) -> PrefixShape {
    let width = config.key_value_width();
    PrefixShape {
        len: pre_seq_len,
        embedding_width: match config.architecture.naming {
            Naming::ChatGlm => config.hidden_size,
            Naming::ChatGlm2 | Naming::Glm => config.num_layers * width,
        },
        hidden_size: config.hidden_size,
        width,
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
        let mut adapter = adapter.clone();
        let specs = match &mut adapter {
            AdapterSection::Lora(lora) => {
                lora.target_modules = targets(config, &lora.target_modules)?;
                lora_specs(config, lora.r, &lora.target_modules)
            }
            AdapterSection::Prefix(_) if Names::of(config).prefix_encoder.is_none() => {
                return Err(ModelError::NoPrefixEncoder);
            }
            AdapterSection::Prefix(prefix) => prefix_specs(config, prefix),
            AdapterSection::Full(_) if config.quantization != Quantization::None => {
                return Err(ModelError::TrainedCodes {
                    found: quantised::word(config.quantization),
                });
            }
            AdapterSection::Full(_) => base_specs(config, tied),
        };
        Ok(Trainables {
            adapter: Some(adapter),
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

    /// The same with weight decay on every tensor, as an optimiser with a single parameter group has it.
    pub fn in_one_group(mut self) -> Self {
        for spec in &mut self.specs {
            spec.decay = true;
        }
        self
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

/// `target_modules` as PEFT reads it where it stands for all linear layers of the blocks.
const ALL_LINEAR: &str = "all-linear";
/// The layer that LoRA goes beside unless something else is asked for; queries, keys and values each where
/// they have layers of their own.
const FUSED_TARGET: &str = "query_key_value";

/// `target_modules` in the model's own names: those of layers in the order of the forward pass, then those
/// of single modules.
///
/// # Errors
/// A name that no linear layer of the model has.
fn targets(config: &ModelConfig, target_modules: &[String]) -> Result<Vec<String>, ModelError> {
    let names = Names::of(config);
    let split = [LinearSite::Query, LinearSite::Key, LinearSite::Value];
    let stands_for = |name: &str, site: LinearSite| match name {
        ALL_LINEAR => true,
        FUSED_TARGET if names.splits_qkv() => split.contains(&site),
        name => name == names.target(site),
    };
    let wanted = |site: &LinearSite| target_modules.iter().any(|name| stands_for(name, *site));
    let sites = names.linear_sites().filter(wanted);
    let mut own: Vec<String> = sites.map(|site| names.target(site).to_owned()).collect();
    for name in target_modules {
        if names.linear_sites().any(|site| stands_for(name, site)) {
            continue;
        }
        let one = std::slice::from_ref(name);
        let named = |layer| move |site| is_target(one, &names.linear(site, layer));
        if !(0..config.num_layers).any(|layer| names.linear_sites().any(named(layer))) {
            let known: Vec<&str> = names
                .linear_sites()
                .map(|site| names.target(site))
                .collect();
            return Err(ModelError::UnknownTarget {
                name: name.clone(),
                known: known.join(", "),
            });
        }
        own.push(name.clone());
    }
    Ok(own)
}

fn lora_specs(config: &ModelConfig, rank: usize, targets: &[String]) -> Vec<ParameterSpec> {
    let names = Names::of(config);
    let wanted = |site: &LinearSite, layer| is_target(targets, &names.linear(*site, layer));
    let mut specs = Vec::new();
    for layer in 0..config.num_layers {
        for site in names.linear_sites().filter(|site| wanted(site, layer)) {
            let (in_features, out_features) = site.features(config);
            for (matrix, role, shape) in [
                ("lora_A", Role::LoraA, vec![rank, in_features]),
                ("lora_B", Role::LoraB, vec![out_features, rank]),
            ] {
                specs.push(ParameterSpec {
                    name: lora_name(names, site, layer, matrix),
                    shape,
                    slice: None,
                    decay: true,
                    role,
                });
            }
        }
    }
    specs
}

/// The part of a prefix tensor that belongs to block `layer`.
pub fn prefix_part(shape: PrefixShape, layer: usize) -> Range<usize> {
    layer * shape.width..(layer + 1) * shape.width
}

fn prefix_specs(config: &ModelConfig, section: &PrefixSection) -> Vec<ParameterSpec> {
    let names = Names::of(config);
    let prefix = prefix_shape(config, section.pre_seq_len);
    let layers = config.num_layers;
    let spec = |tensor: &str, shape: Vec<usize>, part: Option<(usize, usize)>, role| {
        let slice = part.map(|(axis, layer)| Slice {
            axis,
            start: prefix_part(prefix, layer).start,
            len: prefix.width,
        });
        ParameterSpec {
            name: prefix_name(names, tensor),
            shape,
            slice,
            decay: !tensor.ends_with("bias"),
            role,
        }
    };
    let (hidden, all) = (prefix.hidden_size, layers * prefix.width);
    if !section.prefix_projection {
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
    let width = prefix.embedding_width;
    let shared = Role::PrefixProjection { in_features: width };
    let role = Role::PrefixProjection {
        in_features: hidden,
    };
    let mut specs = vec![
        spec(
            "embedding.weight",
            vec![prefix.len, width],
            None,
            Role::PrefixEmbedding,
        ),
        spec("trans.0.weight", vec![hidden, width], None, shared),
        spec("trans.0.bias", vec![hidden], None, shared),
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
    // The Hugging Face trainer spares biases and layer norms; an RMS norm is none to it.
    let spares = |name: &str| {
        let norms = config.architecture.norm == NormKind::Layer;
        name.ends_with(".bias") || norms && name.contains("layernorm")
    };
    weights::own_tensors(config, tied)
        .into_iter()
        .map(|(name, shape)| ParameterSpec {
            decay: !spares(&name),
            name,
            shape,
            slice: None,
            role: Role::Base,
        })
        .collect()
}
