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
    let mut pending: Vec<usize> = Vec::new();
    let mut tokens = 0;
    let mut finish = |pending: &mut Vec<usize>| -> Result<(), TrainError> {
        if !pending.is_empty() {
            let picked = pending.drain(..).filter_map(|index| rows.get(index));
            let batch = MicroBatch::from_rows(picked);
            targets += batch.targets.len();
            sum += f64::from(engine.evaluate(batch)?);
        }
        Ok(())
    };
    for (index, len) in rows.lengths().enumerate() {
        if tokens + len > max_tokens || pending.len() == max_sequences {
            finish(&mut pending)?;
            tokens = 0;
        }
        pending.push(index);
        tokens += len;
    }
    finish(&mut pending)?;
    Ok(ValidationReport {
        step,
        loss: (sum / targets as f64) as f32,
        target_tokens: targets as u64,
    })
}
