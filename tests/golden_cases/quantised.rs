//! A base of codes: codes and scales, and the model on what they stand for, which must be the model on
//! those weights, bit for bit.

use std::sync::Arc;

use half::f16;
use mp_train::checkpoint::{CheckpointError, Dtype, HostTensor, TensorInfo, TensorSource};
use mp_train::config::model::ModelConfig;
use mp_train::config::run::Quantization;
use mp_train::model::names::Names;
use mp_train::model::quantised;
use mp_train::model::weights::{is_block_matrix, scale_name};
use mp_train::quant::{Bits, QuantisedMatrix};

use super::adapter::Adapter;
use super::batch::{Padding, Stored};
use super::case::{Case, Family};
use super::compare::{Found, FoundTensors, Report};
use super::single::Parts;
use super::{Golden, Outcome, forward, gradients, manifest, trained, training};

/// What stands in the model's files in place of the four linear layers of every block.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Codes and scales, as THUDM's `quantize()` leaves them.
    Codes,
    /// The weights that they stand for, rounded to float16 as the original does.
    Rounded,
    /// The same without that rounding.
    Unrounded,
}

/// The model's files with the four linear layers of every block quantised.
struct Quantised {
    model: Arc<dyn TensorSource>,
    config: ModelConfig,
    bits: Bits,
    form: Form,
}

impl Quantised {
    /// The weight that a tensor of scales belongs to.
    fn weight_of<'a>(&self, scale: &'a str) -> Option<&'a str> {
        let weight = scale.strip_suffix("_scale")?;
        (scale_name(weight) == scale && self.is_quantised(weight)).then_some(weight)
    }

    fn is_quantised(&self, name: &str) -> bool {
        let info = self.model.info(name);
        info.is_some_and(|info| is_block_matrix(&self.config, name, &info.shape))
    }

    fn matrix(&self, name: &str) -> Result<QuantisedMatrix, CheckpointError> {
        let tensor = self.model.read(name)?;
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let weight: Vec<f16> = tensor.to_f16()?;
        Ok(QuantisedMatrix::quantise(&weight, rows, cols, self.bits).unwrap())
    }
}

impl TensorSource for Quantised {
    fn names(&self) -> Vec<String> {
        let names = self.model.names();
        let scales = names.iter().filter(|name| self.is_quantised(name));
        let scales: Vec<String> = scales.map(|name| scale_name(name)).collect();
        match self.form {
            Form::Codes => names.into_iter().chain(scales).collect(),
            Form::Rounded | Form::Unrounded => names,
        }
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let (name, scale) = match self.weight_of(name) {
            Some(weight) if self.form == Form::Codes => (weight, true),
            _ => (name, false),
        };
        let mut info = self.model.info(name)?;
        if scale {
            info.shape.pop();
            info.dtype = Dtype::F16;
        } else if self.form == Form::Codes && self.is_quantised(name) {
            info.shape[1] = self.bits.row_bytes(info.shape[1]);
            info.dtype = Dtype::I8;
        }
        Some(info)
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        if let Some(weight) = self.weight_of(name).filter(|_| self.form == Form::Codes) {
            let matrix = self.matrix(weight)?;
            return HostTensor::from_f16([matrix.rows], &matrix.scales);
        }
        if !self.is_quantised(name) {
            return self.model.read(name);
        }
        let matrix = self.matrix(name)?;
        let shape = [matrix.rows, matrix.cols];
        match self.form {
            Form::Rounded => HostTensor::from_f16(shape, &matrix.dequantised()),
            Form::Unrounded => HostTensor::from_f32(shape, &matrix.dequantised_unrounded()),
            Form::Codes => {
                let bytes = matrix.codes.iter().map(|code| code.to_le_bytes()[0]);
                let shape = self.info(name).unwrap().shape;
                HostTensor::new(Dtype::I8, shape, bytes.collect())
            }
        }
    }
}

pub fn run<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let quantization = match case.hyper::<u32>("bits")? {
        8 => Quantization::Int8,
        4 => Quantization::Int4,
        bits => return Err(format!("{bits} bits").into()),
    };
    let bits = quantised::bits(quantization).ok_or("no bits")?;
    let quantised = |form| {
        Arc::new(Quantised {
            model: Arc::clone(&family.model),
            config: family.config.clone(),
            bits,
            form,
        })
    };
    let rounded = quantised(Form::Rounded);
    report.compare(case, "codes", &codes(family, case, &rounded)?)?;

    let source = |form| quantised(form) as Arc<dyn TensorSource>;
    let bases = [
        ("quantised_at_load", Arc::clone(&family.model), quantization),
        ("from_codes", source(Form::Codes), quantization),
        ("frozen", source(Form::Rounded), Quantization::None),
    ];
    let stored = Stored::of(case)?;
    let (none, prefix) = (Adapter::none(), Adapter::prefix(case.folder()?)?);
    for padding in Padding::BOTH {
        let batch = stored.right_padded(family, padding)?;
        let found = |source: &Arc<dyn TensorSource>, quantization| -> Outcome<FoundTensors> {
            let parts = |adapter| Parts::new(family, adapter).held(source, quantization);
            let mut found = forward::found::<B>(&parts(&none), &batch)?;
            let with_prefix = gradients::found::<B>(&parts(&prefix), &batch)?;
            found.extend(under("ptuning", with_prefix));
            Ok(found)
        };
        let mut all = Vec::new();
        for (name, source, quantization) in &bases {
            all.push((*name, found(source, *quantization)?));
        }
        let (_, mut first) = all.remove(0);
        for (name, other) in &all {
            let what = format!("bits/{}/{name}", padding.name());
            report.same(&what, difference(&first, other));
        }
        let unrounded = source(Form::Unrounded);
        let parts = |adapter| Parts::new(family, adapter).held(&unrounded, Quantization::None);
        first.extend(under(
            "unrounded",
            forward::found::<B>(&parts(&none), &batch)?,
        ));
        if case.expects("unrounded.ptuning.loss") {
            let with_prefix = gradients::found::<B>(&parts(&prefix), &batch)?;
            first.extend(under("unrounded.ptuning", with_prefix));
        }
        report.compare(case, padding.name(), &first)?;
    }

    let plain_prefix = match family.form() {
        manifest::Form::Named => "ptuning_train",
        manifest::Form::Listed => "ptuning_train_plain",
    };
    for name in ["lora_train", plain_prefix] {
        let case = family.case(name)?;
        let adapter = trained::starting_adapter(&case)?;
        let parts = bases.iter().map(|(name, source, quantization)| {
            let parts = Parts::new(family, &adapter).held(source, *quantization);
            (*name, parts)
        });
        training::same_on_all::<B>(&parts.collect::<Vec<_>>(), &case, report)?;
    }
    Ok(())
}

/// The first tensor that is not the same, bit for bit.
fn difference(one: &FoundTensors, other: &FoundTensors) -> Option<String> {
    let bits = |found: &Found| -> Vec<Option<u64>> {
        let values = found.values.iter();
        values.map(|value| value.map(f64::to_bits)).collect()
    };
    if one.is_empty() || !one.keys().eq(other.keys()) {
        return Some("other tensors".to_owned());
    }
    let mut pairs = one.iter().zip(other.values());
    let differs = pairs.find(|((_, one), other)| bits(one) != bits(other));
    differs.map(|((name, _), _)| name.clone())
}

fn under(run: &str, found: FoundTensors) -> impl Iterator<Item = (String, Found)> {
    let found = found.into_iter();
    found.map(move |(name, tensor)| (format!("{run}.{name}"), tensor))
}

/// Codes and scales as they are stored, and the dequantised weights.
fn codes(family: &Family, case: &Case, quantised: &Quantised) -> Outcome<FoundTensors> {
    let mut found = FoundTensors::new();
    let names = Names::of(&family.config);
    for layer in 0..family.config.num_layers {
        for site in names.linear_sites() {
            let name = format!("{}.weight", names.linear(site, layer));
            let matrix = quantised.matrix(&name)?;
            let shape = [matrix.rows, matrix.codes.len() / matrix.rows];
            found.insert(name.clone(), Found::whole(shape, &matrix.codes));
            let scales: Vec<f32> = matrix.scales.iter().map(|scale| scale.to_f32()).collect();
            found.insert(scale_name(&name), Found::whole([scales.len()], &scales));
            let weights = matrix.dequantised();
            let weights: Vec<f32> = weights.iter().map(|weight| weight.to_f32()).collect();
            // `.._rows_0_7`, its first rows.
            let lead = format!("dequantised.layer{layer}_{}_rows_", names.target(site));
            for name in case.expected_names().filter(|name| name.starts_with(&lead)) {
                let shape = [matrix.rows, matrix.cols];
                found.insert(name.to_owned(), Found::whole(shape, &weights));
            }
        }
    }
    Ok(found)
}
