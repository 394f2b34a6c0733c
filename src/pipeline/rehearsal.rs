//! A step before the first that does not count: what would fail hours later for want of memory fails now.

use std::sync::Arc;

use super::base::Layout;
use super::messages::StepPlan;
use super::schedule::{Schedule, ScheduleError};
use crate::config::model::ModelConfig;
use crate::config::run::{OptimizerSection, ScheduleKind};
use crate::data::batch::{MicroBatch, Sequence, Target};

/// The actions to be tried.
pub struct Rehearsal {
    /// As many of the largest micro-batch as are ever in flight.
    pub step: StepPlan,
    /// The order of actions for that many.
    pub schedule: Arc<Schedule>,
}

impl Rehearsal {
    /// A rehearsal of the largest steps of a run.
    ///
    /// # Errors
    /// None: a schedule that exists for the whole step exists for its beginning.
    pub fn of(
        layout: &Layout,
        model: &ModelConfig,
        optimizer: &OptimizerSection,
        loss_scale: f32,
    ) -> Result<Self, ScheduleError> {
        let full = &layout.schedule;
        let stages = full.stages.len();
        // With so many every stage has as many in flight as it ever has.
        let enough = match full.kind {
            ScheduleKind::OneForwardOneBackward => stages,
            ScheduleKind::Interleaved => 2 * stages,
            ScheduleKind::Gpipe => full.micro_batches,
        };
        let count = enough.min(full.micro_batches);
        let batch = largest_micro_batch(model, layout.max_rows, layout.max_sequences);
        let targets = (count * batch.targets.len()).max(1);
        Ok(Rehearsal {
            schedule: Arc::new(Schedule::build(
                full.kind,
                stages,
                full.virtual_stages,
                count,
            )?),
            step: StepPlan {
                step: 0,
                updates: 0,
                learning_rate: 0.0,
                loss_scale,
                target_weights: vec![1.0 / targets as f32; count],
                micro_batches: vec![batch; count],
                optimizer: optimizer.clone(),
                seed: 0,
            },
        })
    }
}

/// `rows` tokens in `sequences` sequences, all of them with a target: no micro-batch takes more. What the
/// tokens are does not matter.
fn largest_micro_batch(model: &ModelConfig, rows: usize, sequences: usize) -> MicroBatch {
    let (vocabulary, positions) = (model.vocab_size, model.max_sequence_length);
    let mut batch = MicroBatch::default();
    for index in 0..sequences {
        let len = rows / sequences + usize::from(index < rows % sequences);
        let start = batch.tokens();
        for t in 0..len {
            let id = ((start + t) % vocabulary) as u32;
            batch.input_ids.push(id);
            batch.position.push(t.min(positions - 1) as u32);
            batch.block_position.push(0);
            batch.targets.push(Target {
                row: (start + t) as u32,
                id,
            });
        }
        batch.sequences.push(Sequence {
            start,
            len,
            context_length: len,
        });
    }
    batch
}
