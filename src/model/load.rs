//! From tensors in files to the layers of a stage.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;

use super::ModelError;
use super::attention::Attention;
use super::block::Block;
use super::linear::{Linear, Weight};
use super::mlp::Mlp;
use super::names::{LinearSite, Names, NormSite};
use super::norm::Norm;
use super::qkv::QueryKeyValue;
use super::quantised::{self, Matrix, QuantisedWeight};
use super::trainables::{self, Trainables};
use super::weights;
use crate::adapter::lora::Lora;
use crate::adapter::prefix::PrefixEncoder;
use crate::adapter::{AdapterError, Parameter, ParameterSpec, ParameterState};
use crate::backend::{AttentionLayout, Backend, Element, ElementsMut, Pulse, Sums};
use crate::checkpoint::{CheckpointError, Dtype, Synthetic, TensorSource};
use crate::config::architecture::{NormKind, QkvLayout};
use crate::config::model::ModelConfig;
use crate::config::run::{AdapterSection, ProductSums};
use crate::quant::{Bits, QuantError, check_cols, quantise_row};

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
    /// Beats with every piece of a tensor that is loaded, and with every block that is computed later.
    pub pulse: &'a Arc<Pulse>,
    /// Whether this is the stage that counts parameters held by several stages.
    pub first_stage: bool,
    /// How the linear layers of the blocks add.
    pub sums: Sums,
}

/// How a device adds under a setting.
pub fn sums(setting: ProductSums) -> Sums {
    match setting {
        ProductSums::F32 => Sums::F32,
        ProductSums::F16 => Sums::F16,
    }
}

/// A tensor on its way from its file, for all threads that read pieces of it.
struct Reading<'a> {
    source: &'a dyn TensorSource,
    pulse: &'a Pulse,
    name: &'a str,
}

impl Reading<'_> {
    /// A piece is read, or could not be.
    fn done(&self, read: Result<(), CheckpointError>) -> Result<(), ModelError> {
        self.pulse.beat();
        Ok(read.map_err(|error| error.in_tensor(&self.file(), self.name))?)
    }

    fn file(&self) -> PathBuf {
        let info = self.source.info(self.name);
        info.map(|info| info.file).unwrap_or_default()
    }
}

impl<B: Backend> Loader<'_, B> {
    /// A tensor of the base model, converted on its way to the device, or made there.
    fn base<T: Element>(&self, name: &str) -> Result<B::Buffer<T>, ModelError> {
        if let Some(made) = self.source.synthetic(name) {
            return self.synthetic(name, made);
        }
        let tensor = self.source.open(name)?;
        let reading = self.reading(name);
        let upload = |start, out: &mut [T]| {
            reading.done(match T::by_type(out) {
                ElementsMut::F32(out) => tensor.read_f32(start, out),
                ElementsMut::F16(out) => tensor.read_f16(start, out),
            })
        };
        self.backend
            .upload_pieces(tensor.element_count(), 1, upload)
    }

    fn synthetic<T: Element>(
        &self,
        name: &str,
        made: Synthetic,
    ) -> Result<B::Buffer<T>, ModelError> {
        let info = self.source.info(name);
        let len = info.map_or(0, |info| info.shape.iter().product());
        let made = match made {
            Synthetic::Constant(value) => self.backend.upload(&vec![T::from_f32(value); len])?,
            Synthetic::Random { key, deviation } => {
                let mut out = self.backend.zeros(len)?;
                self.backend.synthetic(&mut out, len, key, deviation)?;
                out
            }
        };
        self.pulse.beat();
        Ok(made)
    }

    fn reading<'b>(&'b self, name: &'b str) -> Reading<'b> {
        Reading {
            source: self.source,
            pulse: self.pulse,
            name,
        }
    }

    /// The weight of a linear layer as codes: those of a quantised folder, or made of the weights row
    /// by row.
    fn quantised(
        &self,
        site: LinearSite,
        name: &str,
        bits: Bits,
    ) -> Result<QuantisedWeight<B>, ModelError> {
        let (cols, rows) = site.features(self.config);
        let reading = self.reading(name);
        let wrong = |reason| ModelError::Quantised {
            file: reading.file(),
            name: name.to_owned(),
            reason,
        };
        check_cols(cols, bits).map_err(wrong)?;
        let row_bytes = bits.row_bytes(cols);
        if let Some(Synthetic::Random { key, deviation }) = self.source.synthetic(name) {
            let len = rows * row_bytes;
            let mut codes = self.backend.zeros(len)?;
            self.backend.synthetic_codes(&mut codes, len, key, bits)?;
            self.pulse.beat();
            return Ok(QuantisedWeight {
                codes,
                scales: self
                    .backend
                    .upload(&vec![bits.scale_for(deviation); rows])?,
                bits,
                rows,
                cols,
            });
        }
        let tensor = self.source.open(name)?;
        let mut scales = vec![f16::ZERO; rows];
        let codes = if tensor.dtype() == Dtype::I8 {
            let scale_name = weights::scale_name(name);
            let stored = self.source.open(&scale_name)?;
            let read = stored.read_f16(0, &mut scales);
            self.reading(&scale_name).done(read)?;
            if let Some(row) = scales.iter().position(|scale| !scale.is_finite()) {
                return Err(wrong(QuantError::Scale { row }));
            }
            let upload = |start, out: &mut [i8]| reading.done(tensor.read_i8(start, out));
            self.backend.upload_pieces(rows * row_bytes, 1, upload)?
        } else {
            // Rows are quantised by several threads; each piece has the scales of its own rows.
            let made = Mutex::new(&mut scales[..]);
            let upload = |start, out: &mut [i8]| {
                let mut row_values = vec![f16::ZERO; cols];
                for (index, codes) in out.chunks_exact_mut(row_bytes).enumerate() {
                    let row = start / row_bytes + index;
                    reading.done(tensor.read_f16(row * cols, &mut row_values))?;
                    let scale = quantise_row(codes, &row_values, bits)
                        .map_err(|col| wrong(QuantError::NotFinite { row, col }))?;
                    made.lock().unwrap_or_else(PoisonError::into_inner)[row] = scale;
                }
                Ok::<_, ModelError>(())
            };
            self.backend
                .upload_pieces(rows * row_bytes, row_bytes, upload)?
        };
        Ok(QuantisedWeight {
            codes,
            scales: self.backend.upload(&scales)?,
            bits,
            rows,
            cols,
        })
    }

    /// A tensor of the base model: `name` among the trainables, `file_name` in the files.
    pub fn weight(
        &self,
        name: &str,
        file_name: &str,
        counted: bool,
    ) -> Result<Weight<B>, ModelError> {
        match self.trainables.find(name, None) {
            Some((index, spec)) if self.trainables.is_full() => {
                let state = (self.initial)(spec)?;
                let master = match state.is_of_base() {
                    true => self.base(file_name)?,
                    false => self.backend.upload(&state.values)?,
                };
                let (backend, spec) = (self.backend, spec.clone());
                let parameter = Parameter::over(backend, spec, index, counted, master, &state)?;
                Ok(Weight::Trained(Box::new(parameter)))
            }
            _ => Ok(Weight::Frozen(self.base(file_name)?)),
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
    pub fn norm(&self, module: &str) -> Result<Norm<B>, ModelError> {
        let tensor = |kind: &str| {
            let name = format!("{module}.{kind}");
            self.weight(&name, &name, true)
        };
        Ok(Norm {
            weight: tensor("weight")?,
            bias: match self.config.architecture.norm {
                NormKind::Layer => Some(tensor("bias")?),
                NormKind::Rms => None,
            },
            hidden_size: self.config.hidden_size,
            eps: self.config.norm_epsilon,
        })
    }

    fn linear(&self, site: LinearSite, layer: usize) -> Result<Linear<B>, ModelError> {
        let (in_features, out_features) = site.features(self.config);
        let names = Names::of(self.config);
        let module = names.linear(site, layer);
        let tensor = |kind: &str| {
            let name = format!("{module}.{kind}");
            self.weight(&name, &name, true)
        };
        let mut linear = Linear {
            site,
            layer,
            in_features,
            out_features,
            weight: match quantised::bits(self.config.quantization) {
                Some(bits) => {
                    Matrix::Quantised(self.quantised(site, &format!("{module}.weight"), bits)?)
                }
                None => Matrix::Plain(tensor("weight")?),
            },
            bias: match site.has_bias(self.config) {
                true => Some(tensor("bias")?),
                false => None,
            },
            lora: None,
            lora_dropout: 0.0,
            sums: self.sums,
        };
        if let Some(AdapterSection::Lora(lora)) = &self.trainables.adapter {
            let a = trainables::lora_name(names, site, layer, "lora_A");
            if self.trainables.find(&a, None).is_some() {
                let a = self.parameter(&a, None, true)?;
                let b = trainables::lora_name(names, site, layer, "lora_B");
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
        let names = Names::of(config);
        let linear = |site| self.linear(site, layer);
        Ok(Block {
            norm1: self.norm(&names.norm(NormSite::Input, layer))?,
            attention: Attention {
                query_key_value: match names.splits_qkv() {
                    true => QueryKeyValue::Split(Box::new([
                        linear(LinearSite::Query)?,
                        linear(LinearSite::Key)?,
                        linear(LinearSite::Value)?,
                    ])),
                    false => QueryKeyValue::Fused(Box::new(linear(LinearSite::QueryKeyValue)?)),
                },
                dense: linear(LinearSite::Dense)?,
                layer,
                layout: attention_layout(config),
            },
            norm2: self.norm(&names.norm(NormSite::PostAttention, layer))?,
            mlp: Mlp {
                dense_h_to_4h: linear(LinearSite::HTo4h)?,
                dense_4h_to_h: linear(LinearSite::FourHToH)?,
                activation: config.architecture.activation,
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
        let names = Names::of(self.config);
        let part = |tensor: &str, layer: usize| {
            let start = trainables::prefix_part(shape, layer).start;
            self.parameter(&trainables::prefix_name(names, tensor), Some(start), true)
        };
        let encoder = if prefix.prefix_projection {
            let whole = |tensor: &str| {
                self.parameter(
                    &trainables::prefix_name(names, tensor),
                    None,
                    self.first_stage,
                )
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

/// How the heads of a model lie in a row of queries, keys and values.
fn attention_layout(config: &ModelConfig) -> AttentionLayout {
    let (heads, head_dim) = (config.num_attention_heads, config.head_dim);
    match config.architecture.qkv {
        QkvLayout::PerHead => AttentionLayout::grouped_per_head(heads, head_dim),
        QkvLayout::Concatenated => {
            AttentionLayout::concatenated(heads, config.num_key_value_heads, head_dim)
        }
    }
}
