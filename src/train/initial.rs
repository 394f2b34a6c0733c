//! Where trainable parameters get their values from.

use std::collections::BTreeMap;
use std::path::Path;

use super::TrainError;
use super::checkpoint::Resumed;
use crate::adapter::files::{self, WholeTensors};
use crate::adapter::initial::initial_values;
use crate::adapter::{AdapterError, ParameterSpec, ParameterState};
use crate::config::run::{AdapterSection, RunConfig};
use crate::model::trainables::Trainables;
use crate::pipeline::launch::InitialValues;

/// Values of a resumed run, of `init_adapter`, of the base model, or by the seed: whichever comes
/// first in this list.
pub(super) fn values(
    config: &RunConfig,
    trainables: &Trainables,
    resumed: Option<Resumed>,
) -> Result<InitialValues, TrainError> {
    if let Some(resumed) = resumed {
        return from_state(trainables, resumed);
    }
    let given = match &trainables.adapter {
        Some(AdapterSection::Lora(lora)) => match &lora.init_adapter {
            Some(folder) => Some(files::read_lora(folder, lora, trainables.specs())?),
            None => None,
        },
        Some(AdapterSection::Prefix(prefix)) => match &prefix.init_adapter {
            Some(folder) => Some(files::read_prefix(folder, prefix, trainables.specs())?),
            None => None,
        },
        Some(AdapterSection::Full(_)) | None => {
            return Ok(Box::new(|_| Ok(ParameterState::of_base())));
        }
    };
    let seed = config.run.seed;
    Ok(Box::new(move |spec| {
        let values = match &given {
            Some(given) => given.get(&spec.name).map(|whole| spec.cut(whole)),
            None => initial_values(spec, seed),
        };
        values
            .map(ParameterState::fresh)
            .ok_or_else(|| without_source(spec))
    }))
}

fn without_source(spec: &ParameterSpec) -> AdapterError {
    AdapterError::MissingTensor {
        file: Path::new("initial values").to_owned(),
        name: spec.name.clone(),
        found: "nothing".to_owned(),
    }
}

fn from_state(trainables: &Trainables, resumed: Resumed) -> Result<InitialValues, TrainError> {
    let file = resumed.tensors_file();
    let mut parts = Vec::new();
    for part in ["values", "exp_avg", "exp_avg_sq"] {
        let lead = format!("{part}/");
        let tensors: BTreeMap<_, _> = resumed
            .tensors
            .iter()
            .filter_map(|(name, tensor)| {
                let name = name.strip_prefix(&lead)?;
                Some((name.to_owned(), tensor.clone()))
            })
            .collect();
        parts.push(files::take(&file, trainables.specs(), &tensors)?);
    }
    Ok(Box::new(move |spec| {
        let cut = |part: &WholeTensors| {
            let whole = part.get(&spec.name).ok_or_else(|| without_source(spec))?;
            Ok::<_, AdapterError>(spec.cut(whole))
        };
        Ok(ParameterState {
            values: cut(&parts[0])?,
            exp_avg: cut(&parts[1])?,
            exp_avg_sq: cut(&parts[2])?,
        })
    }))
}
