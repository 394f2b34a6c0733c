//! Loss and gradients of one micro-batch on a single stage.

use super::adapter::Adapter;
use super::batch::{Batch, Padding, Stored};
use super::case::{Case, Family};
use super::compare::{FoundTensors, Report};
use super::single::{Parts, Single};
use super::{Golden, Outcome, observed};

/// Forward, loss and backward of a batch.
pub fn found<B: Golden>(parts: &Parts<'_>, batch: &Batch) -> Outcome<FoundTensors> {
    let mut single = Single::<B>::load(parts, &batch.micro)?;
    single.forward(&batch.micro)?;
    let prefix_len = parts.adapter.prefix_len();
    let mut found = observed::forward(&mut single, parts.family, batch, prefix_len)?;
    if prefix_len > 0 {
        let prefix = observed::prefix_key_value(&mut single, parts.family, prefix_len)?;
        found.insert("prefix_key_value".into(), prefix);
    }
    single.loss(&batch.micro)?;
    single.backward()?;
    observed::loss(&mut single, batch, &mut found)?;
    observed::gradients(&mut single, &mut found)?;
    Ok(found)
}

fn both_paddings<B: Golden>(
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

/// The adapter of a PEFT folder.
pub fn lora<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::lora(case.folder()?)?;
    both_paddings::<B>(&Parts::new(family, &adapter), case, report)
}

/// The prefix of a THUDM folder, whose weights stand in the case once more.
pub fn prefix<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::prefix(case.folder()?)?;
    for name in case.inputs_under("weight.") {
        let stored = case.input_values(name)?;
        let same = adapter.file_values(&name["weight.".len()..])? == stored;
        report.same(name, (!same).then(|| "folder and case disagree".to_owned()));
    }
    both_paddings::<B>(&Parts::new(family, &adapter), case, report)
}

/// Every parameter, embedding and head apart.
pub fn full<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::full(&family.model, &family.head_source);
    both_paddings::<B>(&Parts::new(family, &adapter), case, report)
}

/// Every parameter, the embedding used for the head too.
pub fn tied<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let head_source = family.tied_to_embedding();
    let adapter = Adapter::full(&family.model, &head_source);
    let parts = Parts {
        head_source,
        ..Parts::new(family, &adapter)
    };
    both_paddings::<B>(&parts, case, report)
}
