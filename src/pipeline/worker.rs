//! One worker: an interpreter of its stage's program.

use std::sync::Arc;

use super::failure::Cause;
use super::gradients::{self, Agreement};
use super::messages::{Command, InferPlan, Reply, StepOutcome, StepPlan};
use super::permits::Permits;
use super::place::{Phase, Place, action_name};
use super::profile::{Record, SpanKind};
use super::rehearsal::Rehearsal;
use super::schedule::{Action, Flow, Operation, Schedule};
use crate::backend::{Backend, Element, Pulse, Span};
use crate::comm::{CommError, Mailbox, Parcel, Room, Transport};
use crate::data::batch::MicroBatch;
use crate::model::batch::BatchRows;
use crate::model::linear::NoiseKey;
use crate::model::stage::{KeyValueCache, Stage};

/// A stage of the model at work. Its pulse tells at which [`Place`] its device is.
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
    /// Activations that come and go.
    pub activations: Mailbox<B, f32>,
    /// Their gradients.
    pub gradients: Mailbox<B, B::Element>,
    pub pulse: Arc<Pulse>,
    /// Step and action under way, for the report of a failure.
    pub doing: Arc<std::sync::Mutex<Doing>>,
    /// Commands obeyed, the present one included.
    pub command: u32,
    /// What was done so far in the step that is measured.
    pub noted: Option<Vec<SpanKind>>,
}

/// What a worker is at.
#[derive(Clone, Debug, Default)]
pub(super) struct Doing {
    pub step: Option<u64>,
    pub action: String,
}

impl<B: Backend, T: Transport<B>> Worker<B, T> {
    /// Carries out one command.
    ///
    /// # Errors
    /// What ends the worker; what it was at stands in `doing`.
    pub fn obey(&mut self, command: Command) -> Result<Reply, Cause> {
        self.command = self.command.wrapping_add(1);
        match command {
            Command::Connect => self.connect(),
            Command::Rehearse(rehearsal) => self.rehearse(&rehearsal),
            Command::Step(plan) => self.step(&plan).map(Reply::Step),
            Command::Profile(plan) => self.profile(&plan),
            Command::Evaluate(batch) => self.evaluate(&batch).map(Reply::Evaluate),
            Command::Infer(plan) => self.infer(&plan).map(Reply::Infer),
            Command::Snapshot => self.snapshot(),
            Command::Memory => Ok(Reply::Memory(self.backend.memory_use())),
        }
    }

    fn connect(&mut self) -> Result<Reply, Cause> {
        self.at(None, "connecting".to_owned());
        let room = Room {
            all_reduce: self
                .agreement
                .values()
                .max(self.stage.shared_gradient_len()),
        };
        self.transport.start(&self.backend, &self.pulse, room)?;
        Ok(Reply::Ready)
    }

    fn at(&self, step: Option<u64>, action: String) {
        *lock(&self.doing) = Doing { step, action };
    }

    /// Lets the pulse reach a place when everything queued so far is done.
    fn reach(&self, operation: usize, phase: Phase) -> Result<(), Cause> {
        if self.pulse.is_stopped() {
            return Err(CommError::Stopped.into());
        }
        let place = Place {
            command: self.command,
            operation,
            phase,
        };
        Ok(self.backend.mark(place.pack())?)
    }

    fn step(&mut self, plan: &StepPlan) -> Result<StepOutcome, Cause> {
        let end = self.actions(plan, Some(plan.step + 1))?;
        self.update(plan, end)
    }

    /// A step that is measured.
    fn profile(&mut self, plan: &StepPlan) -> Result<Reply, Cause> {
        self.backend.measure()?;
        self.backend.stamp()?;
        self.noted = Some(Vec::new());
        let outcome = self.step(plan)?;
        let noted = self.noted.take().unwrap_or_default();
        let record = Record::new(noted, self.backend.measured()?);
        Ok(Reply::Profile(outcome, record))
    }

    /// Notes what the stage was at until here, in a step that is measured.
    fn note(&mut self, what: SpanKind) -> Result<(), Cause> {
        if let Some(noted) = &mut self.noted {
            self.backend.stamp()?;
            noted.push(what);
        }
        Ok(())
    }

    /// A step without its update. What it leaves is overwritten or cleared when the next one begins;
    /// weights and moments are changed by an update alone.
    fn rehearse(&mut self, rehearsal: &Rehearsal) -> Result<Reply, Cause> {
        let full = std::mem::replace(&mut self.schedule, Arc::clone(&rehearsal.schedule));
        let end = self.actions(&rehearsal.step, None);
        self.schedule = full;
        let end = end?;
        self.at(None, action_name(&[], end));
        self.complete(end)?;
        self.reach(end + 1, Phase::Input)?;
        self.agreement
            .rehearse(&self.backend, &mut self.transport)?;
        Ok(Reply::Ready)
    }

    /// All actions and exchanges of a step, from cleared gradients on; gives the place behind them.
    fn actions(&mut self, plan: &StepPlan, step: Option<u64>) -> Result<usize, Cause> {
        self.at(step, "begin".to_owned());
        self.stage.begin_step(&self.backend)?;
        self.agreement.clear(&self.backend)?;
        self.note(SpanKind::Prepare)?;
        let program = self.schedule.program(self.transport.rank());
        // The last action of each flow, whose output the next exchange of the flow sends.
        let mut done = [None; 2];
        for (place, operation) in program.iter().enumerate() {
            self.reach(place, Phase::Input)?;
            self.at(step, action_name(&program, place));
            match *operation {
                Operation::Run(action) => {
                    match action.flow {
                        Flow::Forward => self.forward(plan, action, place)?,
                        Flow::Backward => self.backward(action, place)?,
                    }
                    done[action.flow as usize] = Some(action);
                }
                Operation::Exchange {
                    flow,
                    send,
                    receive,
                } => {
                    let sent = done[flow as usize];
                    let parcel = |peer: Option<usize>, action: Option<Action>| {
                        let batch = &plan.micro_batches[action?.micro_batch];
                        let len = batch.tokens() * self.stage.hidden_size();
                        Some(Parcel { peer: peer?, len })
                    };
                    let (peer, awaited) = receive.unzip();
                    let (send, receive) = (parcel(send, sent), parcel(peer, awaited));
                    self.exchange(flow, send, receive)?;
                    self.note(SpanKind::Exchange(flow))?;
                }
            }
        }
        Ok(program.len())
    }

    /// Completes the gradients that stages share, at place `end` of a step.
    fn complete(&mut self, end: usize) -> Result<(), Cause> {
        let others = self.transport.stages() > 1;
        let shares = self.stage.shared_gradient_len() > 0 || self.stage.tied_mut().is_some();
        self.reach(
            end,
            match others && shares {
                true => Phase::Input,
                false => Phase::Work,
            },
        )?;
        let (stage, backend) = (&mut self.stage, &self.backend);
        gradients::complete(stage, backend, &mut self.transport, self.layers)
    }

    /// The end of a step, at place `end` of its program.
    fn update(&mut self, plan: &StepPlan, end: usize) -> Result<StepOutcome, Cause> {
        self.at(Some(plan.step + 1), action_name(&[], end));
        self.complete(end)?;
        self.agreement
            .enter_norms(&self.backend, &self.stage.parameters(), plan)?;
        self.note(SpanKind::Update)?;
        self.reach(end + 1, Phase::Input)?;
        let (backend, transport) = (&self.backend, &mut self.transport);
        let parameters = self.stage.parameters();
        let agreement = &mut self.agreement;
        let outcome = agreement.decide(backend, transport, &parameters, plan)?;
        drop(parameters);
        self.note(SpanKind::Agree)?;
        self.reach(end + 1, Phase::Work)?;
        if outcome.applied {
            gradients::update(&self.backend, self.stage.parameters(), plan, &outcome)?;
        }
        self.note(SpanKind::Update)?;
        Ok(outcome)
    }

    fn exchange(
        &mut self,
        flow: Flow,
        send: Option<Parcel>,
        receive: Option<Parcel>,
    ) -> Result<(), Cause> {
        let (transport, backend) = (&mut self.transport, &self.backend);
        match flow {
            Flow::Forward => transport.exchange(backend, &mut self.activations, send, receive)?,
            Flow::Backward => transport.exchange(backend, &mut self.gradients, send, receive)?,
        }
        Ok(())
    }

    fn forward(&mut self, plan: &StepPlan, action: Action, place: usize) -> Result<(), Cause> {
        let Action {
            micro_batch, chunk, ..
        } = action;
        let slot = self.slot_of(action);
        let batch = &plan.micro_batches[micro_batch];
        let noise = NoiseKey {
            seed: plan.seed,
            step: plan.step,
            micro_batch: plan.run_micro_batch(micro_batch),
        };
        let (stage, backend) = (&mut self.stage, &self.backend);
        let at = (chunk, slot);
        fill(
            stage,
            backend,
            at,
            batch,
            &spans(batch, None),
            &[],
            Some(noise),
        )?;
        self.note(SpanKind::Prepare)?;
        self.take_input(chunk, slot)?;
        let destination = self.schedule.destination(self.transport.rank(), action);
        {
            let permits = Arc::clone(&self.permits);
            let _permit = permits.acquire(&self.pulse)?;
            self.note(SpanKind::Wait(Flow::Forward))?;
            self.reach(place, Phase::Work)?;
            let (stage, backend) = (&mut self.stage, &self.backend);
            stage.forward(backend, chunk, slot, None)?;
            if destination.is_none() {
                let scale = plan.loss_scale * plan.target_weights[micro_batch];
                stage.loss(backend, slot, scale)?;
            }
        }
        let filled = self.stage.slot(chunk, slot);
        match &filled.token_loss {
            Some(loss) if destination.is_none() => {
                let (backend, targets) = (&self.backend, filled.batch.targets);
                self.agreement
                    .enter_loss(backend, micro_batch, loss, targets)?;
                self.note(SpanKind::Run(action))
            }
            _ => {
                self.note(SpanKind::Run(action))?;
                self.reach(place, Phase::Output)?;
                self.give_output()
            }
        }
    }

    fn backward(&mut self, action: Action, place: usize) -> Result<(), Cause> {
        let (chunk, slot, rank) = (action.chunk, self.slot_of(action), self.transport.rank());
        let (stage, backend, transport) = (&mut self.stage, &self.backend, &mut self.transport);
        if self.schedule.source(rank, action).is_some() {
            transport.arrived(backend, &mut self.gradients)?;
            std::mem::swap(stage.gradient_mut(), &mut self.gradients.incoming);
        }
        {
            let permits = Arc::clone(&self.permits);
            let _permit = permits.acquire(&self.pulse)?;
            self.note(SpanKind::Wait(Flow::Backward))?;
            self.reach(place, Phase::Work)?;
            self.stage.backward(&self.backend, chunk, slot)?;
            self.note(SpanKind::Run(action))?;
        }
        if self.schedule.destination(rank, action).is_some() {
            self.reach(place, Phase::Output)?;
            let (stage, backend, transport) = (&mut self.stage, &self.backend, &mut self.transport);
            transport.sent(backend, &mut self.gradients)?;
            std::mem::swap(stage.gradient_mut(), &mut self.gradients.outgoing);
        }
        Ok(())
    }

    /// Micro-batches of a chunk start and finish in ascending order, so their slots go round.
    fn slot_of(&self, action: Action) -> usize {
        action.micro_batch % self.stage.slots(action.chunk)
    }

    /// Puts what arrived into a slot of a chunk that does not start from ids.
    fn take_input(&mut self, chunk: usize, slot: usize) -> Result<(), Cause> {
        let action = Action::forward(0, chunk);
        let (transport, backend) = (&mut self.transport, &self.backend);
        if self.schedule.source(transport.rank(), action).is_some() {
            transport.arrived(backend, &mut self.activations)?;
            let input = self.stage.input_mut(chunk, slot);
            std::mem::swap(input, &mut self.activations.incoming);
        }
        Ok(())
    }

    /// Lays the output of the last forward out to be sent.
    fn give_output(&mut self) -> Result<(), Cause> {
        self.transport.sent(&self.backend, &mut self.activations)?;
        std::mem::swap(self.stage.output_mut(), &mut self.activations.outgoing);
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
        let slot = stage.slot(self.schedule.virtual_stages - 1, 0);
        Ok(match &slot.token_loss {
            Some(losses) => {
                let losses = backend.read(losses, slot.batch.targets)?;
                let sum: f64 = losses.into_iter().map(f64::from).sum();
                Some(sum as f32)
            }
            None => None,
        })
    }

    /// One micro-batch through all chunks of this stage, without a backward to follow.
    fn pass(
        &mut self,
        batch: &MicroBatch,
        spans: &[Span],
        cache_rows: &[u32],
        cached: bool,
    ) -> Result<(), Cause> {
        let rank = self.transport.rank();
        let len = batch.tokens() * self.stage.hidden_size();
        let parcel = |peer: Option<usize>| peer.map(|peer| Parcel { peer, len });
        for chunk in 0..self.schedule.virtual_stages {
            let action = Action::forward(0, chunk);
            let source = parcel(self.schedule.source(rank, action));
            let destination = parcel(self.schedule.destination(rank, action));
            let (stage, backend) = (&mut self.stage, &self.backend);
            fill(stage, backend, (chunk, 0), batch, spans, cache_rows, None)?;
            if source.is_some() {
                self.exchange(Flow::Forward, None, source)?;
            }
            self.reach(chunk, Phase::Input)?;
            self.take_input(chunk, 0)?;
            {
                let _permit = self.permits.acquire(&self.pulse)?;
                self.reach(chunk, Phase::Work)?;
                if chunk == 0 {
                    self.stage.prepare_prefix(&self.backend)?;
                }
                let cache = self.cache.as_mut().filter(|_| cached);
                self.stage.forward(&self.backend, chunk, 0, cache)?;
            }
            if destination.is_some() {
                self.reach(chunk, Phase::Output)?;
                self.give_output()?;
                self.exchange(Flow::Forward, destination, None)?;
            }
        }
        self.reach(self.schedule.virtual_stages, Phase::Work)
    }

    fn snapshot(&mut self) -> Result<Reply, Cause> {
        self.at(None, "snapshot".to_owned());
        let mut states = Vec::new();
        for parameter in self.stage.parameters() {
            self.pulse.beat();
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
    (chunk, slot): (usize, usize),
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
    Ok(stage.fill(backend, chunk, slot, host)?)
}
