//! One worker: an interpreter of its stage's actions.

use std::sync::Arc;

use super::failure::{Cause, Failure};
use super::gradients::{self, Agreement};
use super::messages::{Command, InferPlan, Reply, StepOutcome, StepPlan};
use super::permits::Permits;
use super::schedule::{Action, Schedule};
use crate::backend::{Backend, Element, Span};
use crate::comm::Transport;
use crate::data::batch::MicroBatch;
use crate::model::batch::BatchRows;
use crate::model::linear::NoiseKey;
use crate::model::stage::{KeyValueCache, Stage};

/// A stage of the model at work.
pub(super) struct Worker<B: Backend, T> {
    pub backend: B,
    pub transport: T,
    pub stage: Stage<B>,
    pub schedule: Arc<Schedule>,
    pub permits: Arc<Permits>,
    pub agreement: Agreement<B>,
    /// Blocks of the whole model.
    pub layers: usize,
    pub cache: Option<KeyValueCache<B>>,
    /// Step and action under way, for the report of a failure.
    pub doing: Arc<std::sync::Mutex<Doing>>,
}

/// What a worker is at.
#[derive(Clone, Debug, Default)]
pub(super) struct Doing {
    pub step: Option<u64>,
    pub action: String,
}

impl<B: Backend, T: Transport<B>> Worker<B, T> {
    /// Carries out one command.
    pub fn obey(&mut self, command: Command) -> Result<Reply, Failure> {
        let result = match command {
            Command::Step(plan) => self.step(&plan).map(Reply::Step),
            Command::Evaluate(batch) => self.evaluate(&batch).map(Reply::Evaluate),
            Command::Infer(plan) => self.infer(&plan).map(Reply::Infer),
            Command::Snapshot => self.snapshot(),
        };
        result.map_err(|cause| self.failure(cause))
    }

    fn failure(&self, cause: Cause) -> Failure {
        let doing = lock(&self.doing).clone();
        Failure {
            rank: self.transport.rank(),
            step: doing.step,
            doing: doing.action,
            cause,
        }
    }

    fn at(&self, step: Option<u64>, action: String) {
        *lock(&self.doing) = Doing { step, action };
    }

    fn step(&mut self, plan: &StepPlan) -> Result<StepOutcome, Cause> {
        let number = Some(plan.step + 1);
        self.at(number, "begin".to_owned());
        self.stage.begin_step(&self.backend)?;
        self.agreement.clear(&self.backend)?;
        let schedule = Arc::clone(&self.schedule);
        let rank = self.transport.rank();
        let slots = schedule.slots(rank);
        for &action in &schedule.stages[rank] {
            self.at(number, action.to_string());
            let peers = (
                schedule.source(rank, action),
                schedule.destination(rank, action),
            );
            // Micro-batches start and finish in ascending order, so their slots go round.
            let slot = action.micro_batch() % slots;
            match action {
                Action::Forward(micro_batch) => self.forward(plan, micro_batch, slot, peers)?,
                Action::Backward(_) => self.backward(slot, peers)?,
            }
        }
        self.at(number, "update".to_owned());
        let (stage, backend) = (&mut self.stage, &self.backend);
        gradients::complete(stage, backend, &mut self.transport, self.layers)?;
        let parameters = stage.parameters();
        let transport = &mut self.transport;
        let outcome = self
            .agreement
            .decide(backend, transport, &parameters, plan)?;
        if outcome.applied {
            gradients::update(backend, parameters, plan, &outcome)?;
        }
        Ok(outcome)
    }

    fn forward(
        &mut self,
        plan: &StepPlan,
        micro_batch: usize,
        slot: usize,
        (source, destination): (Option<usize>, Option<usize>),
    ) -> Result<(), Cause> {
        let (stage, backend) = (&mut self.stage, &self.backend);
        let batch = &plan.micro_batches[micro_batch];
        let noise = NoiseKey {
            seed: plan.seed,
            step: plan.step,
            micro_batch: plan.run_micro_batch(micro_batch),
        };
        fill(
            stage,
            backend,
            slot,
            batch,
            &spans(batch, None),
            &[],
            Some(noise),
        )?;
        let len = stage.activation_len(slot);
        if let Some(source) = source {
            let input = stage.input_mut(slot);
            self.transport.recv(backend, source, input, len)?;
        }
        {
            let _permit = self.permits.acquire();
            stage.forward(backend, slot, None)?;
            if destination.is_none() {
                let scale = plan.loss_scale * plan.target_weights[micro_batch];
                stage.loss(backend, slot, scale)?;
            }
        }
        match (destination, &stage.slot(slot).token_loss) {
            (Some(destination), _) => {
                self.transport
                    .send(backend, destination, stage.output(), len)?;
            }
            (None, Some(loss)) => {
                let targets = stage.slot(slot).batch.targets;
                self.agreement
                    .enter_loss(backend, micro_batch, loss, targets)?;
            }
            (None, None) => {}
        }
        Ok(())
    }

    fn backward(
        &mut self,
        slot: usize,
        (source, destination): (Option<usize>, Option<usize>),
    ) -> Result<(), Cause> {
        let (stage, backend) = (&mut self.stage, &self.backend);
        let len = stage.activation_len(slot);
        if let Some(source) = source {
            let gradient = stage.gradient_mut();
            self.transport.recv(backend, source, gradient, len)?;
        }
        {
            let _permit = self.permits.acquire();
            stage.backward(backend, slot)?;
        }
        if let Some(destination) = destination {
            let gradient = &*stage.gradient_mut();
            self.transport.send(backend, destination, gradient, len)?;
        }
        Ok(())
    }

    fn infer(&mut self, plan: &InferPlan) -> Result<Option<Vec<f32>>, Cause> {
        self.at(None, "forward without gradients".to_owned());
        let spans = spans(&plan.batch, plan.cache.as_ref());
        let mut cache_rows = Vec::new();
        if let Some(cache) = &plan.cache {
            if let Some(rows) = cache.renew {
                self.cache = Some(self.stage.cache(&self.backend, rows)?);
            }
            for (span, (start, filled)) in spans.iter().zip(cache.starts.iter().zip(&cache.filled))
            {
                let first = start + filled;
                cache_rows.extend((first..first + span.q_len).map(|row| row as u32));
            }
        }
        self.pass(&plan.batch, &spans, &cache_rows, plan.cache.is_some())?;
        let logits = self.stage.logits(&self.backend, 0, plan.rows)?;
        Ok(logits.map(|logits| logits.logits.into_iter().map(Element::to_f32).collect()))
    }

    fn evaluate(&mut self, batch: &MicroBatch) -> Result<Option<f32>, Cause> {
        self.at(None, "validation".to_owned());
        self.pass(batch, &spans(batch, None), &[], false)?;
        let (stage, backend) = (&mut self.stage, &self.backend);
        // A scale of zero gives the losses and no gradient.
        stage.loss(backend, 0, 0.0)?;
        let slot = stage.slot(0);
        Ok(match &slot.token_loss {
            Some(losses) => {
                let losses = backend.read(losses, slot.batch.targets)?;
                let sum: f64 = losses.into_iter().map(f64::from).sum();
                Some(sum as f32)
            }
            None => None,
        })
    }

    /// One micro-batch through this stage without a backward to follow.
    fn pass(
        &mut self,
        batch: &MicroBatch,
        spans: &[Span],
        cache_rows: &[u32],
        cached: bool,
    ) -> Result<(), Cause> {
        let (stage, backend) = (&mut self.stage, &self.backend);
        let (rank, stages) = (self.transport.rank(), self.transport.stages());
        fill(stage, backend, 0, batch, spans, cache_rows, None)?;
        let len = stage.activation_len(0);
        if rank > 0 {
            let input = stage.input_mut(0);
            self.transport.recv(backend, rank - 1, input, len)?;
        }
        {
            let _permit = self.permits.acquire();
            stage.prepare_prefix(backend)?;
            let cache = self.cache.as_mut().filter(|_| cached);
            stage.forward(backend, 0, cache)?;
        }
        if rank + 1 < stages {
            self.transport
                .send(backend, rank + 1, stage.output(), len)?;
        }
        Ok(())
    }

    fn snapshot(&mut self) -> Result<Reply, Cause> {
        self.at(None, "snapshot".to_owned());
        let mut states = Vec::new();
        for parameter in self.stage.parameters() {
            if parameter.counted() {
                states.push((parameter.index(), parameter.state(&self.backend)?));
            }
        }
        Ok(Reply::Snapshot(states))
    }
}

/// The lock without its poison: what a worker was at is worth reading after its panic.
pub(super) fn lock(doing: &std::sync::Mutex<Doing>) -> std::sync::MutexGuard<'_, Doing> {
    doing
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The sequences of a batch as attention sees them, over its own rows or those of a cache.
fn spans(batch: &MicroBatch, cache: Option<&super::messages::CachePlan>) -> Vec<Span> {
    let span = |(index, sequence): (usize, &crate::data::batch::Sequence)| {
        let (kv_start, filled) = match cache {
            Some(cache) => (cache.starts[index], cache.filled[index]),
            None => (sequence.start, 0),
        };
        Span {
            q_start: sequence.start,
            q_len: sequence.len,
            kv_start,
            kv_len: filled + sequence.len,
            context_length: sequence.context_length,
        }
    };
    batch.sequences.iter().enumerate().map(span).collect()
}

fn fill<B: Backend>(
    stage: &mut Stage<B>,
    backend: &B,
    slot: usize,
    batch: &MicroBatch,
    spans: &[Span],
    cache_rows: &[u32],
    noise: Option<NoiseKey>,
) -> Result<(), Cause> {
    let target_rows: Vec<u32> = batch.targets.iter().map(|target| target.row).collect();
    let target_ids: Vec<u32> = batch.targets.iter().map(|target| target.id).collect();
    let host = BatchRows {
        input_ids: &batch.input_ids,
        position: &batch.position,
        block_position: &batch.block_position,
        spans,
        target_rows: &target_rows,
        target_ids: &target_ids,
        cache_rows,
        noise,
    };
    Ok(stage.fill(backend, slot, host)?)
}
