//! Proof that a schedule is complete, ordered, matched, free of deadlock and within its slots.

use std::collections::HashSet;

use super::{Action, Schedule, Transfers};

/// Why a schedule must not be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Nothing to do.
    #[error("a schedule needs at least one stage and one micro-batch")]
    Empty,
    /// A micro-batch that the step does not have.
    #[error("stage {rank} has {action}, but the step has only {micro_batches} micro-batches")]
    OutOfRange {
        /// Stage.
        rank: usize,
        /// The action.
        action: Action,
        /// Micro-batches in the step.
        micro_batches: usize,
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
    #[error("stage {rank} has B{micro_batch} before F{micro_batch}")]
    BackwardFirst {
        /// Stage.
        rank: usize,
        /// The micro-batch.
        micro_batch: usize,
    },
    /// A receiver that takes messages in another order than they are sent.
    #[error("stage {from} sends the output of {sent} where stage {to} awaits that of {awaited}")]
    Unmatched {
        /// Sending stage.
        from: usize,
        /// Receiving stage.
        to: usize,
        /// What is sent.
        sent: Action,
        /// What the receiver expects at that place.
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
        /// The action that it cannot begin, or whose output it cannot hand over.
        action: Action,
    },
    /// More saved activations than the kind of schedule allows.
    #[error("stage {rank} has {used} micro-batches in flight, {allowed} are allowed")]
    Slots {
        /// Stage.
        rank: usize,
        /// Most micro-batches in flight.
        used: usize,
        /// Most that the kind of schedule allows.
        allowed: usize,
    },
}

impl Schedule {
    /// Checks everything that a worker relies on: every micro-batch has one forward and later one
    /// backward on every stage, neighbours send and receive in the same order, micro-batches
    /// ascend, a run ends with buffered and with grouped rendezvous transfers, and no stage has
    /// more micro-batches in flight than [`Schedule::allowed_slots`].
    pub fn validate(&self) -> Result<(), ScheduleError> {
        if self.stages.is_empty() || self.micro_batches == 0 {
            return Err(ScheduleError::Empty);
        }
        for rank in 0..self.stages.len() {
            self.complete(rank)?;
        }
        for rank in 1..self.stages.len() {
            self.matched(rank - 1, rank, forwards)?;
            self.matched(rank, rank - 1, backwards)?;
        }
        for rank in 0..self.stages.len() {
            self.ascending(rank)?;
        }
        self.simulate(Transfers::Buffered)?;
        self.simulate(Transfers::GroupedRendezvous)?;
        for rank in 0..self.stages.len() {
            let (used, allowed) = (self.slots(rank), self.allowed_slots(rank));
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
        let micro_batches = self.micro_batches;
        let mut seen = HashSet::new();
        for &action in &self.stages[rank] {
            let micro_batch = action.micro_batch();
            if micro_batch >= micro_batches {
                return Err(ScheduleError::OutOfRange {
                    rank,
                    action,
                    micro_batches,
                });
            }
            if !seen.insert(action) {
                return Err(ScheduleError::Repeated { rank, action });
            }
            if matches!(action, Action::Backward(_))
                && !seen.contains(&Action::Forward(micro_batch))
            {
                return Err(ScheduleError::BackwardFirst { rank, micro_batch });
            }
        }
        (0..micro_batches)
            .flat_map(|i| [Action::Forward(i), Action::Backward(i)])
            .find(|action| !seen.contains(action))
            .map_or(Ok(()), |action| {
                Err(ScheduleError::Missing { rank, action })
            })
    }

    fn matched(
        &self,
        from: usize,
        to: usize,
        direction: fn(&Action) -> bool,
    ) -> Result<(), ScheduleError> {
        let sent = self.stages[from].iter().copied().filter(direction);
        let awaited = self.stages[to].iter().copied().filter(direction);
        sent.zip(awaited)
            .find(|(sent, awaited)| sent != awaited)
            .map_or(Ok(()), |(sent, awaited)| {
                Err(ScheduleError::Unmatched {
                    from,
                    to,
                    sent,
                    awaited,
                })
            })
    }

    fn ascending(&self, rank: usize) -> Result<(), ScheduleError> {
        for direction in [forwards, backwards] {
            let order: Vec<Action> = self.stages[rank]
                .iter()
                .copied()
                .filter(direction)
                .collect();
            for pair in order.windows(2) {
                if pair[0].micro_batch() >= pair[1].micro_batch() {
                    return Err(ScheduleError::NotAscending {
                        rank,
                        earlier: pair[0],
                        later: pair[1],
                    });
                }
            }
        }
        Ok(())
    }
}

fn forwards(action: &Action) -> bool {
    matches!(action, Action::Forward(_))
}

fn backwards(action: &Action) -> bool {
    matches!(action, Action::Backward(_))
}
