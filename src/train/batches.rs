//! The micro-batches of the next steps, made by a thread of their own while a step is computed: rows may
//! have to come from the disk.

use std::panic::resume_unwind;
use std::thread::{Scope, ScopedJoinHandle};

use crossbeam::channel::{Receiver, bounded};

use super::target_weights;
use crate::config::run::RunConfig;
use crate::data::batch::MicroBatch;
use crate::data::rows::Rows;
use crate::data::sampler::{Sampler, SamplerState};

/// Steps whose micro-batches lie ready, beside the one that is being made.
const AHEAD: usize = 2;

/// What one step is given of the data.
pub(super) struct StepBatches {
    /// In the order of the sampler.
    pub micro_batches: Vec<MicroBatch>,
    /// Weight of one target of each micro-batch in the loss of the step.
    pub target_weights: Vec<f32>,
    /// Where the data goes on behind them.
    pub after: SamplerState,
}

/// The thread, and what it has made.
pub(super) struct Batches<'scope> {
    ready: Receiver<StepBatches>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Batches<'scope> {
    /// Starts the thread, which makes the micro-batches of `steps` steps from where `sampler` stands. It
    /// ends before that when nobody takes them any more.
    pub fn start<'run: 'scope>(
        scope: &'scope Scope<'scope, '_>,
        config: &'run RunConfig,
        rows: &'run Rows,
        mut sampler: Sampler,
        steps: u64,
    ) -> Self {
        let (give, ready) = bounded(AHEAD);
        let thread = scope.spawn(move || {
            for _ in 0..steps {
                if give.send(made(config, rows, &mut sampler)).is_err() {
                    return;
                }
            }
        });
        Batches {
            ready,
            thread: Some(thread),
        }
    }
}

impl Iterator for Batches<'_> {
    type Item = StepBatches;

    /// Those of the next step; `None` behind the last. A panic of the thread goes on here.
    fn next(&mut self) -> Option<StepBatches> {
        let ready = self.ready.recv().ok();
        if ready.is_none()
            && let Some(Err(panic)) = self.thread.take().map(ScopedJoinHandle::join)
        {
            resume_unwind(panic);
        }
        ready
    }
}

fn made(config: &RunConfig, rows: &Rows, sampler: &mut Sampler) -> StepBatches {
    let micro_batches: Vec<MicroBatch> = (0..config.run.gradient_accumulation)
        .map(|_| {
            let indices = sampler.next_micro_batch();
            MicroBatch::from_rows(indices.into_iter().filter_map(|index| rows.get(index)))
        })
        .collect();
    StepBatches {
        target_weights: target_weights(config.optimizer.loss_normalisation, &micro_batches),
        micro_batches,
        after: sampler.state(),
    }
}
