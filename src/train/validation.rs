//! Loss of rows that are not trained on.

use super::TrainError;
use crate::data::batch::MicroBatch;
use crate::data::rows::Rows;
use crate::pipeline::launch::Engine;
use crate::report::ValidationReport;

/// Mean loss over all targets of `rows`, in micro-batches of at most `max_tokens` tokens and
/// `max_sequences` sequences.
pub(super) fn measure(
    engine: &mut Engine,
    rows: &Rows,
    max_tokens: usize,
    max_sequences: usize,
    step: u64,
) -> Result<ValidationReport, TrainError> {
    let (mut sum, mut targets) = (0.0f64, 0usize);
    for batch in MicroBatch::packed(rows, max_tokens, max_sequences) {
        targets += batch.targets.len();
        sum += f64::from(engine.evaluate(batch)?);
    }
    Ok(ValidationReport {
        step,
        loss: (sum / targets as f64) as f32,
        target_tokens: targets as u64,
    })
}
