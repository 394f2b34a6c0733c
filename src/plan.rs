//! `mp-train plan`: what a run would do and need, before anything is loaded.

use std::fmt::Write;

use crate::config::run::RunConfig;
use crate::data::sampler::SamplerState;
use crate::model::memory;
use crate::pipeline::base::StartError;
use crate::pipeline::prepare::Prepared;
use crate::report::FailureClass;

/// Why no plan could be made: as for a training run.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct PlanError(#[from] StartError);

impl PlanError {
    /// Whose turn it is.
    pub fn class(&self) -> FailureClass {
        match self.0.is_machine() {
            true => FailureClass::Machine,
            false => FailureClass::User,
        }
    }
}

/// The plan of a run as text: stages, memory, schedule.
///
/// # Errors
/// As a training run before its first step.
pub fn describe(config: &RunConfig) -> Result<String, PlanError> {
    let mut silent = |_| std::ops::ControlFlow::Continue(());
    let prepared = Prepared::open(config, SamplerState::default(), &mut silent)?;
    let (layout, model) = (&prepared.layout, &prepared.base.config);
    let mut text = String::new();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{} rows, {} tokens, {:.0} % of them with a target; at most {} tokens in a micro-batch",
        prepared.rows.len(),
        prepared.rows.tokens(),
        100.0 * prepared.rows.target_share(),
        layout.max_rows,
    );
    let _ = writeln!(
        text,
        "{} trainable parameters\n",
        prepared.trainables.count()
    );
    let _ = writeln!(
        text,
        "stage  device  blocks      recompute       weights  trainables  activations  workspace  total MiB"
    );
    for (rank, stage) in layout.stages.iter().enumerate() {
        let recompute = layout.recompute[rank];
        let sizes = layout.sizes(rank);
        let bytes = memory::stage_bytes(model, &prepared.trainables, &sizes, recompute);
        let ends = match (stage.embedding, stage.head) {
            (true, true) => "E+H",
            (true, false) => "E",
            (false, true) => "H",
            (false, false) => "",
        };
        let _ = writeln!(
            text,
            "{rank:<5}  {:<6}  {:<6} {ends:<4} {:<14} {:>8.1}  {:>10.1}  {:>11.1}  {:>9.1}  {:>9.1}",
            layout.devices[rank].to_string(),
            stage
                .chunks
                .iter()
                .map(|run| format!("{}..{}", run.start, run.end))
                .collect::<Vec<_>>()
                .join(" "),
            format!("{recompute:?}"),
            mib(bytes.weights),
            mib(bytes.trainables),
            mib(bytes.slots),
            mib(bytes.workspace),
            mib(bytes.total()),
        );
    }
    let _ = writeln!(
        text,
        "\none step (a backward drawn twice as long as a forward):"
    );
    text.push_str(&layout.schedule.grid(1, 2));
    let idle = layout.schedule.idle_fraction(1, 2);
    let _ = write!(text, "idle: {:.1} %", 100.0 * idle);
    Ok(text)
}
