//! Proof that a schedule is complete, ordered, matched, free of deadlock and within its slots.

use super::{Action, Flow, Schedule, Transfers};

/// Why a schedule does not exist or must not be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Nothing to do.
    #[error("a schedule needs at least one stage, one chunk and one micro-batch")]
    Empty,
    /// The interleaved schedule for a number of micro-batches that it cannot take.
    #[error(
        "schedule = \"interleaved\" over {stages} stages with {micro_batches} micro-batches in a step: \
         it takes them in groups of {stages}; set run.gradient_accumulation to {}, or use \
         schedule = \"1f1b\"",
        multiples(*stages, *micro_batches)
    )]
    NotInterleavable {
        /// Stages.
        stages: usize,
        /// Micro-batches in the step.
        micro_batches: usize,
    },
    /// A micro-batch or a chunk that the step does not have.
    #[error(
        "stage {rank} has {action}, but the step has only {micro_batches} micro-batches through \
         {virtual_stages} chunks"
    )]
    OutOfRange {
        /// Stage.
        rank: usize,
        /// The action.
        action: Action,
        /// Micro-batches in the step.
        micro_batches: usize,
        /// Chunks on every stage.
        virtual_stages: usize,
    },
    /// An action that stands twice.
    #[error("stage {rank} has {action} twice")]
    Repeated {
        /// Stage.
        rank: usize,
        /// The action.
        action: Action,
    },
    /// An action that is absent.
    #[error("stage {rank} never does {action}")]
    Missing {
        /// Stage.
        rank: usize,
        /// The action.
        action: Action,
    },
    /// A backward without its forward.
    #[error("stage {rank} has {action} before the forward of the same micro-batch")]
    BackwardFirst {
        /// Stage.
        rank: usize,
        /// The backward.
        action: Action,
    },
    /// A receiver that takes messages in another order than they are sent.
    #[error(
        "stage {from} sends the output of {sent} where stage {to} awaits the input of {awaited}"
    )]
    Unmatched {
        /// Sending stage.
        from: usize,
        /// Receiving stage.
        to: usize,
        /// The action on `from` whose output is sent.
        sent: Action,
        /// The action on `to` that is next to receive.
        awaited: Action,
    },
    /// Micro-batches out of order, so that sums would depend on the schedule.
    #[error("stage {rank} has {later} after {earlier}; micro-batches must ascend")]
    NotAscending {
        /// Stage.
        rank: usize,
        /// The action that stands first.
        earlier: Action,
        /// The action of a lower micro-batch that stands later.
        later: Action,
    },
    /// Stages that wait for each other.
    #[error("with {transfers} transfers stage {rank} waits for ever at {action}")]
    Deadlock {
        /// How transfers were simulated.
        transfers: Transfers,
        /// The lowest stage that is stuck.
        rank: usize,
        /// Its first action that never begins.
        action: Action,
    },
    /// More saved activations than the kind of schedule allows.
    #[error("stage {rank} has {used} micro-batches in flight, {allowed} are allowed")]
    Slots {
        /// Stage.
        rank: usize,
        /// Most micro-batches in flight, over all its chunks.
        used: usize,
        /// Most that the kind of schedule allows.
        allowed: usize,
    },
}

/// The multiples of `stages` next to `micro_batches`, as text.
fn multiples(stages: usize, micro_batches: usize) -> String {
    let below = micro_batches / stages.max(1) * stages;
    match below {
        0 => stages.to_string(),
        _ => format!("{below} or {}", below + stages),
    }
}

impl Schedule {
    /// Checks everything that a worker relies on: every micro-batch has one forward and later one
    /// backward in every chunk, stages send and receive in the same order, micro-batches ascend in every
    /// chunk, a run ends with buffered, grouped and mailbox transfers, and no stage has more
    /// micro-batches in flight than [`Schedule::allowed_in_flight`].
    ///
    /// # Errors
    /// The first of these, in this order, that does not hold.
    pub fn validate(&self) -> Result<(), ScheduleError> {
        if self.stages.is_empty() || self.micro_batches == 0 || self.virtual_stages == 0 {
            return Err(ScheduleError::Empty);
        }
        for rank in 0..self.stages.len() {
            self.complete(rank)?;
        }
        for flow in [Flow::Forward, Flow::Backward] {
            self.matched(flow)?;
        }
        for rank in 0..self.stages.len() {
            self.ascending(rank)?;
        }
        for transfers in [Transfers::Buffered, Transfers::Grouped, Transfers::Mailbox] {
            self.simulate(transfers)?;
        }
        for rank in 0..self.stages.len() {
            let (used, allowed) = (self.in_flight(rank), self.allowed_in_flight(rank));
            if used > allowed {
                return Err(ScheduleError::Slots {
                    rank,
                    used,
                    allowed,
                });
            }
        }
        Ok(())
    }

    fn complete(&self, rank: usize) -> Result<(), ScheduleError> {
        let (micro_batches, virtual_stages) = (self.micro_batches, self.virtual_stages);
        let mut done = vec![[false; 2]; micro_batches * virtual_stages];
        for &action in &self.stages[rank] {
            if action.micro_batch >= micro_batches || action.chunk >= virtual_stages {
                return Err(ScheduleError::OutOfRange {
                    rank,
                    action,
                    micro_batches,
                    virtual_stages,
                });
            }
            let done = &mut done[action.chunk * micro_batches + action.micro_batch];
            if std::mem::replace(&mut done[action.flow as usize], true) {
                return Err(ScheduleError::Repeated { rank, action });
            }
            if action.flow == Flow::Backward && !done[Flow::Forward as usize] {
                return Err(ScheduleError::BackwardFirst { rank, action });
            }
        }
        for chunk in 0..virtual_stages {
            for micro_batch in 0..micro_batches {
                for action in [
                    Action::forward(micro_batch, chunk),
                    Action::backward(micro_batch, chunk),
                ] {
                    if !done[chunk * micro_batches + micro_batch][action.flow as usize] {
                        return Err(ScheduleError::Missing { rank, action });
                    }
                }
            }
        }
        Ok(())
    }

    /// Messages between two stages carry no names: the k-th that one sends is the k-th that the other
    /// receives, and must be what it takes it for.
    fn matched(&self, flow: Flow) -> Result<(), ScheduleError> {
        let stages = self.stages.len();
        // What stage `from` has sent to `to`, at from * stages + to, and how much of it was received.
        let mut sent = vec![Vec::new(); stages * stages];
        let mut received = vec![0; stages * stages];
        for (from, actions) in self.stages.iter().enumerate() {
            for &action in actions.iter().filter(|action| action.flow == flow) {
                if let Some(to) = self.destination(from, action) {
                    sent[from * stages + to].push(action);
                }
            }
        }
        for (to, actions) in self.stages.iter().enumerate() {
            for &awaited in actions.iter().filter(|action| action.flow == flow) {
                let Some(from) = self.source(to, awaited) else {
                    continue;
                };
                let pair = from * stages + to;
                let next = sent[pair].get(received[pair]).copied();
                received[pair] += 1;
                // As many are sent as are awaited, because every action is there once.
                match next {
                    Some(sent) if !self.leads_to(from, sent, to, awaited) => {
                        return Err(ScheduleError::Unmatched {
                            from,
                            to,
                            sent,
                            awaited,
                        });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Whether the output of `sent` on stage `from` is the input of `awaited` on stage `to`.
    pub(super) fn leads_to(&self, from: usize, sent: Action, to: usize, awaited: Action) -> bool {
        let stages = self.stages.len();
        let before = sent.chunk * stages + from;
        let after = awaited.chunk * stages + to;
        sent.micro_batch == awaited.micro_batch
            && match sent.flow {
                Flow::Forward => before + 1 == after,
                Flow::Backward => before == after + 1,
            }
    }

    fn ascending(&self, rank: usize) -> Result<(), ScheduleError> {
        let mut before: Vec<[Option<Action>; 2]> = vec![[None; 2]; self.virtual_stages];
        for &later in &self.stages[rank] {
            let earlier = before[later.chunk][later.flow as usize].replace(later);
            match earlier {
                Some(earlier) if earlier.micro_batch >= later.micro_batch => {
                    return Err(ScheduleError::NotAscending {
                        rank,
                        earlier,
                        later,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}
