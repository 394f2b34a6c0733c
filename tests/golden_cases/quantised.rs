//! Weights quantised on the host: codes, scales, and the model on what they stand for.

use std::sync::Arc;

use half::f16;
use mp_train::checkpoint::{CheckpointError, HostTensor, TensorInfo, TensorSource};
use mp_train::model::weights::LinearSite;
use mp_train::quant::{Bits, QuantisedMatrix};

use super::adapter::Adapter;
use super::batch::{Padding, Stored};
use super::case::{Case, Family};
use super::compare::{Found, FoundTensors, Report};
use super::single::Parts;
use super::{Golden, Outcome, forward, gradients};

/// The model's files with the four linear layers of every block quantised.
struct Quantised {
    model: Arc<dyn TensorSource>,
    bits: Bits,
    /// Whether `code * scale` is rounded to float16, as the original does.
    rounded: bool,
}

impl Quantised {
    fn is_quantised(name: &str) -> bool {
        let Some(module) = name.strip_suffix(".weight") else {
            return false;
        };
        let site = module.rsplit('.').next().unwrap_or(module);
        module.contains(".layers.") && LinearSite::ALL.iter().any(|known| known.target() == site)
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
        self.model.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.model.info(name)
    }

    fn read(&self, name: &str) -> Result<HostTensor, CheckpointError> {
        if !Quantised::is_quantised(name) {
            return self.model.read(name);
        }
        let matrix = self.matrix(name)?;
        let shape = [matrix.rows, matrix.cols];
        match self.rounded {
            true => HostTensor::from_f16(shape, &matrix.dequantised()),
            false => HostTensor::from_f32(shape, &matrix.dequantised_unrounded()),
        }
    }
}

pub fn run<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let bits = match case.hyper::<u32>("bits")? {
        8 => Bits::Eight,
        4 => Bits::Four,
        bits => return Err(format!("{bits} bits").into()),
    };
    let quantised = |rounded| {
        Arc::new(Quantised {
            model: Arc::clone(&family.model),
            bits,
            rounded,
        })
    };
    let rounded = quantised(true);
    report.compare(case, "codes", &codes(family, case, &rounded)?)?;

    let stored = Stored::of(case)?;
    let (none, prefix) = (Adapter::none(), Adapter::prefix(case.folder()?)?);
    for padding in Padding::BOTH {
        let batch = stored.right_padded(family, padding)?;
        let parts = |source: &Arc<Quantised>, adapter| Parts {
            source: Arc::clone(source) as Arc<dyn TensorSource>,
            ..Parts::new(family, adapter)
        };
        let mut found = forward::found::<B>(&parts(&rounded, &none), &batch)?;
        let unrounded = forward::found::<B>(&parts(&quantised(false), &none), &batch)?;
        found.extend(under("unrounded", unrounded));
        let with_prefix = gradients::found::<B>(&parts(&rounded, &prefix), &batch)?;
        found.extend(under("ptuning", with_prefix));
        report.compare(case, padding.name(), &found)?;
    }
    Ok(())
}

fn under(run: &str, found: FoundTensors) -> impl Iterator<Item = (String, Found)> {
    let found = found.into_iter();
    found.map(move |(name, tensor)| (format!("{run}.{name}"), tensor))
}

/// Codes and scales as they are stored, and the dequantised weights.
fn codes(family: &Family, case: &Case, quantised: &Quantised) -> Outcome<FoundTensors> {
    let mut found = FoundTensors::new();
    for layer in 0..family.config.num_layers {
        for site in LinearSite::ALL {
            let name = format!("{}.weight", site.module(layer));
            let matrix = quantised.matrix(&name)?;
            let shape = [matrix.rows, matrix.codes.len() / matrix.rows];
            found.insert(name.clone(), Found::whole(shape, &matrix.codes));
            let scales: Vec<f32> = matrix.scales.iter().map(|scale| scale.to_f32()).collect();
            found.insert(
                format!("{name}_scale"),
                Found::whole([scales.len()], &scales),
            );
            let weights = matrix.dequantised();
            let weights: Vec<f32> = weights.iter().map(|weight| weight.to_f32()).collect();
            // `.._rows_0_7`, its first rows.
            let lead = format!("dequantised.layer{layer}_{}_rows_", site.target());
            for name in case.expected_names().filter(|name| name.starts_with(&lead)) {
                let shape = [matrix.rows, matrix.cols];
                found.insert(name.to_owned(), Found::whole(shape, &weights));
            }
        }
    }
    Ok(found)
}
