//! What a case trains: gradients of one batch, or a run of steps, whichever it stores.

use mp_train::checkpoint::HostTensor;

use super::adapter::Adapter;
use super::batch::Stored;
use super::case::{Case, Family};
use super::compare::{FoundTensors, Report};
use super::single::Parts;
use super::{Golden, Outcome, forward, gradients, training};

fn run<B: Golden>(parts: &Parts<'_>, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    if case.has("input_ids") {
        gradients::both_paddings::<B>(parts, case, report)?;
    }
    if case.has("train.input_ids") {
        training::train::<B>(parts, case, report)?;
    }
    Ok(())
}

/// The adapter that a case starts from: its own `init.*`, or that of the folder that it names.
pub fn starting_adapter(case: &Case) -> Outcome<Adapter> {
    let of_prefix = case.name.starts_with("ptuning");
    match (case.inputs_under("init.").next(), of_prefix) {
        (Some(_), _) => Adapter::lora_of(case),
        (None, true) => Adapter::prefix(case.folder()?),
        (None, false) => Adapter::lora(case.folder()?),
    }
}

/// A LoRA.
pub fn lora<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = starting_adapter(case)?;
    if let [folder] = &case.folders[..] {
        // The same in PEFT's older file.
        let name = format!("{}_bin", folder.file_name().unwrap().to_string_lossy());
        let beside = folder.with_file_name(&name);
        if let Some(beside) = family.folder_if_any(beside) {
            let same = Adapter::lora(&beside)?.is(&adapter);
            report.same(&name, (!same).then(|| "another adapter".to_owned()));
        }
    }
    if let Some(folder) = family.folder_if_any(format!("adapters/{}_final", case.name)) {
        reference_adapter::<B>(family, case, &Adapter::lora(&folder)?, report)?;
    }
    run::<B>(&Parts::new(family, &adapter), case, report)
}

/// The reference's trained adapter in a folder: what the case says was trained, and the loss with it.
fn reference_adapter<B: Golden>(
    family: &Family,
    case: &Case,
    adapter: &Adapter,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let names: Vec<String> = case.expected_names().map(str::to_owned).collect();
    let mut differs = None;
    for name in names {
        if let Some(tensor) = name.strip_prefix("train.final.") {
            let expected = case.expected(&name)?;
            let stored = adapter.file_values(tensor)?.into_iter().map(f64::from);
            let same = stored.eq(expected.values.iter().copied());
            differs = differs.or((!same).then_some(name));
        }
    }
    report.same("final_folder/as_trained", differs);
    loss_after::<B>(family, case, adapter, "final_folder", report)
}

/// The loss of case `forward` with an adapter that was trained.
pub fn loss_after<B: Golden>(
    family: &Family,
    case: &Case,
    adapter: &Adapter,
    variant: &str,
    report: &mut Report<'_>,
) -> Outcome<()> {
    let batch = Stored::of(&family.case("forward")?)?;
    let batch = batch.right_padded(family, super::batch::Padding::Removed)?;
    let mut found = forward::found::<B>(&Parts::new(family, adapter), &batch)?;
    let loss = found.remove("loss").ok_or("no loss")?;
    let found = FoundTensors::from([("forward_loss_after".to_owned(), loss)]);
    report.compare(case, variant, &found)
}

/// A prefix, whose weights may stand in the case once more, and prompts padded on the left behind it.
pub fn prefix<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = starting_adapter(case)?;
    for name in case.inputs_under("weight.") {
        let stored: HostTensor = case.input_values(name)?;
        let same = adapter.file_values(&name["weight.".len()..])? == stored.to_f32()?;
        report.same(name, (!same).then(|| "folder and case disagree".to_owned()));
    }
    let parts = Parts::new(family, &adapter);
    if case.has("left_pad.input_ids") {
        let batch = Stored::under(case, "left_pad.")?.left_padded(family, case)?;
        let found = forward::found::<B>(&parts, &batch)?.into_iter();
        let found = found.map(|(name, tensor)| (format!("left_pad.{name}"), tensor));
        report.compare(case, "left_pad", &found.collect())?;
    }
    run::<B>(&parts, case, report)
}

/// Every parameter, embedding and head apart.
pub fn full<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let adapter = Adapter::full(&family.config, &family.model, &family.head_source);
    run::<B>(&Parts::new(family, &adapter), case, report)
}

/// Every parameter, embedding and head being one.
pub fn tied<B: Golden>(family: &Family, case: &Case, report: &mut Report<'_>) -> Outcome<()> {
    let head_source = family.tied_to_embedding();
    let adapter = Adapter::full(&family.config, &family.model, &head_source);
    let parts = Parts {
        head_source,
        ..Parts::new(family, &adapter)
    };
    run::<B>(&parts, case, report)
}
