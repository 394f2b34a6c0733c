//! Loss and gradients of one micro-batch on a single stage.

use super::batch::{Batch, Padding, Stored};
use super::case::Case;
use super::compare::{FoundTensors, Report};
use super::single::{Parts, Single};
use super::{Golden, Outcome, observed};

/// Forward, loss and backward of a batch.
pub fn found<B: Golden>(parts: &Parts<'_>, batch: &Batch) -> Outcome<FoundTensors> {
    let mut single = Single::<B>::load(parts, &batch.micro)?;
    single.forward(&batch.micro)?;
    let prefix_len = parts.adapter.prefix_len();
    let mut found = observed::forward(&mut single, parts, batch, prefix_len)?;
    if prefix_len > 0 {
        let prefix = observed::prefix_key_value(&mut single, parts, prefix_len)?;
        found.insert("prefix_key_value".into(), prefix);
    }
    single.loss(&batch.micro)?;
    single.backward()?;
    observed::loss(&mut single, batch, &mut found)?;
    observed::gradients(&mut single, &mut found)?;
    Ok(found)
}

/// The batch of a case, as it is and without its padding.
pub fn both_paddings<B: Golden>(
    parts: &Parts<'_>,
    case: &Case,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let stored = Stored::of(case)?;
    for padding in Padding::BOTH {
        let batch = stored.right_padded(parts.family, padding)?;
        let found = found::<B>(parts, &batch)?;
        report.compare(case, padding.name(), &found)?;
    }
    Ok(())
}
