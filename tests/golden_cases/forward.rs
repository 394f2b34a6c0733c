//! Plain forward passes.

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
    let mut found = observed::forward(&mut single, parts.family, batch, prefix_len)?;
    if !batch.micro.targets.is_empty() {
        single.loss(&batch.micro)?;
        observed::loss(&mut single, batch, &mut found)?;
    }
    Ok(found)
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
        let found = found::<B>(&Parts::new(family, &none), &batch)?;
        report.compare(case, padding.name(), &found)?;
    }
    Ok(())
}

/// Mask and positions passed in, padding on the left cut off.
pub fn left_padded<B: Golden>(
    family: &Family,
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let (stored, none) = (Stored::of(case)?, Adapter::none());
    let batch = stored.masked(case, &stored.non_pad(case)?)?;
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
    let batch = stored.masked(case, &stored.until_last_label())?;
    let found = found::<B>(&Parts::new(family, &none), &batch)?;
    report.compare(case, "unpadded", &found)
}
