//! Plain forward passes.

use std::fs;

use mp_train::config::model::ModelConfig;
use serde_json::{Map, Value};

use super::adapter::Adapter;
use super::batch::{Batch, Padding, Stored};
use super::case::{Case, Family};
use super::compare::{FoundTensors, Report};
use super::single::{Parts, Single};
use super::{Golden, Outcome, observed};

/// Forward of a batch, and the loss where there are targets.
pub fn found<B: Golden>(parts: &Parts<'_>, batch: &Batch) -> Outcome<FoundTensors> {
    let mut single = Single::<B>::load(parts, &batch.micro)?;
    single.forward(&batch.micro)?;
    let prefix_len = parts.adapter.prefix_len();
    let mut found = observed::forward(&mut single, parts, batch, prefix_len)?;
    if !batch.micro.targets.is_empty() {
        single.loss(&batch.micro)?;
        observed::loss(&mut single, batch, &mut found)?;
    }
    Ok(found)
}

/// The model as it is, or with what a case changes in its `config.json`.
fn parts<'a>(family: &'a Family, case: &Case, adapter: &'a Adapter) -> Outcome<Parts<'a>> {
    let mut parts = Parts::new(family, adapter);
    if let Some(overrides) = case.settings["config_overrides"].as_object() {
        let path = family.model_folder().join("config.json");
        let mut json: Map<String, Value> = serde_json::from_str(&fs::read_to_string(path)?)?;
        json.extend(overrides.clone());
        parts.config = ModelConfig::from_json(&Value::Object(json).to_string())?;
    }
    Ok(parts)
}

/// Mask and positions by the model's own rule; padding on the right.
pub fn right_padded<B: Golden>(
    family: &Family,
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let (stored, none) = (Stored::of(case)?, Adapter::none());
    for padding in Padding::BOTH {
        let batch = stored.right_padded(family, padding)?;
        let found = found::<B>(&parts(family, case, &none)?, &batch)?;
        report.compare(case, padding.name(), &found)?;
    }
    Ok(())
}

/// Rows without padding.
pub fn unpadded<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let (stored, none) = (Stored::of(case)?, Adapter::none());
    let batch = stored.right_padded(family, Padding::Fed)?;
    let found = found::<B>(&parts(family, case, &none)?, &batch)?;
    report.compare(case, "unpadded", &found)
}

/// Mask and positions passed in, padding on the left cut off.
pub fn left_padded<B: Golden>(
    family: &Family,
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let (stored, none) = (Stored::of(case)?, Adapter::none());
    let batch = stored.left_padded(family, case)?;
    let found = found::<B>(&Parts::new(family, &none), &batch)?;
    report.compare(case, "unpadded", &found)
}

/// Mask and positions passed in, rows cut behind their last label.
pub fn explicit_mask<B: Golden>(
    family: &Family,
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let (stored, none) = (Stored::of(case)?, Adapter::none());
    let batch = stored.masked(case, &stored.until_last_labels()?)?;
    let found = found::<B>(&Parts::new(family, &none), &batch)?;
    report.compare(case, "unpadded", &found)
}
