//! What a case trains, and the values it starts from.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use mp_train::adapter::{AdapterError, ParameterSpec, ParameterState};
use mp_train::checkpoint::{HostTensor, LoraFiles, PrefixFiles, TensorSource};
use mp_train::config::model::ModelConfig;
use mp_train::config::run::{AdapterSection, FullSection, LoraSection, PrefixSection};
use mp_train::model::names::Names;
use mp_train::model::trainables::Trainables;
use mp_train::model::weights::HeadSource;

use super::Outcome;
use super::case::Case;

/// Trainable tensors and their first values.
#[derive(Clone)]
pub struct Adapter {
    /// What is trained; nothing in plain runs.
    pub section: Option<AdapterSection>,
    values: Values,
}

#[derive(Clone)]
enum Values {
    Files(Arc<BTreeMap<String, HostTensor>>),
    Model {
        source: Arc<dyn TensorSource>,
        /// Where the values of the embedding stand that go by the first name.
        embedding: [&'static str; 2],
    },
}

impl Adapter {
    /// Nothing is trained.
    pub fn none() -> Adapter {
        Adapter {
            section: None,
            values: Values::Files(Arc::default()),
        }
    }

    /// The LoRA of a PEFT folder, without dropout.
    pub fn lora(folder: &Path) -> Outcome<Adapter> {
        let LoraFiles { config, tensors } = LoraFiles::read(folder)?;
        Ok(Adapter {
            section: Some(AdapterSection::Lora(LoraSection {
                r: config.r,
                lora_alpha: config.lora_alpha,
                lora_dropout: 0.0,
                target_modules: config.target_modules,
                init_adapter: None,
            })),
            values: Values::Files(Arc::new(tensors)),
        })
    }

    /// The LoRA that a case begins with, without dropout.
    pub fn lora_of(case: &Case) -> Outcome<Adapter> {
        let mut tensors = BTreeMap::new();
        for name in case.inputs_under("init.") {
            tensors.insert(name["init.".len()..].to_owned(), case.input_values(name)?);
        }
        Ok(Adapter {
            section: Some(AdapterSection::Lora(LoraSection {
                r: case.hyper("rank")?,
                lora_alpha: case.hyper("alpha")?,
                lora_dropout: 0.0,
                target_modules: case.hyper("adapter_targets")?,
                init_adapter: None,
            })),
            values: Values::Files(Arc::new(tensors)),
        })
    }

    /// The same adapter with other values.
    pub fn with_values(&self, tensors: BTreeMap<String, HostTensor>) -> Adapter {
        Adapter {
            section: self.section.clone(),
            values: Values::Files(Arc::new(tensors)),
        }
    }

    /// Whether files hold the same adapter, to the bit.
    pub fn is(&self, other: &Adapter) -> bool {
        match (&self.values, &other.values) {
            (Values::Files(ours), Values::Files(theirs)) => {
                self.section == other.section && ours == theirs
            }
            _ => false,
        }
    }

    /// The prefix of a THUDM folder, without dropout.
    pub fn prefix(folder: &Path) -> Outcome<Adapter> {
        let files = PrefixFiles::read(folder)?;
        Ok(Adapter {
            section: Some(AdapterSection::Prefix(PrefixSection {
                pre_seq_len: files.pre_seq_len,
                prefix_projection: files.prefix_projection,
                prefix_dropout: 0.0,
                init_adapter: None,
            })),
            values: Values::Files(Arc::new(files.tensors)),
        })
    }

    /// Every tensor of the model.
    pub fn full(
        config: &ModelConfig,
        source: &Arc<dyn TensorSource>,
        head_source: &HeadSource,
    ) -> Adapter {
        Adapter {
            section: Some(AdapterSection::Full(FullSection {})),
            values: Values::Model {
                source: Arc::clone(source),
                embedding: [Names::of(config).word_embeddings, head_source.embedding],
            },
        }
    }

    /// The trainable tensors on this model.
    pub fn trainables(&self, config: &ModelConfig, tied: bool) -> Outcome<Trainables> {
        Ok(match &self.section {
            Some(section) => Trainables::new(config, section, tied)?,
            None => Trainables::none(tied),
        })
    }

    /// P; 0 without a prefix.
    pub fn prefix_len(&self) -> usize {
        match &self.section {
            Some(AdapterSection::Prefix(prefix)) => prefix.pre_seq_len,
            _ => 0,
        }
    }

    /// A tensor of the adapter's files.
    pub fn file_values(&self, name: &str) -> Outcome<Vec<f32>> {
        match &self.values {
            Values::Files(tensors) => {
                Ok(tensors.get(name).ok_or(format!("no `{name}`"))?.to_f32()?)
            }
            Values::Model { source, .. } => Ok(source.read(name)?.to_f32()?),
        }
    }

    /// First values of a trainable tensor, or of its part.
    pub fn initial(&self, spec: &ParameterSpec) -> Result<ParameterState, AdapterError> {
        let whole = match &self.values {
            Values::Files(tensors) => match tensors.get(&spec.name) {
                Some(tensor) => tensor.to_f32()?,
                None => {
                    return Err(AdapterError::MissingTensor {
                        file: "adapter".into(),
                        name: spec.name.clone(),
                        found: tensors.keys().next().cloned().unwrap_or_default(),
                    });
                }
            },
            Values::Model { source, embedding } => {
                let [name, stored] = *embedding;
                let stored = match spec.name == name {
                    true => stored,
                    false => &spec.name,
                };
                source.read(stored)?.to_f32()?
            }
        };
        Ok(ParameterState::fresh(spec.cut(&whole)))
    }
}
