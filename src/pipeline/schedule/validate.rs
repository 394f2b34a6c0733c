//! Proof that a schedule is complete, ordered, matched, free of deadlock and within its slots.

use std::collections::HashSet;

use super::{Action, Schedule};

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

/// How a simulated run moves data between stages. Receives block in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfers {
    /// A send returns at once, as into a channel.
    Buffered,
    /// A send returns only when the receive meets it, but a send and the receive after it that go
    /// to the same neighbour are posted together (`ncclGroupStart` .. `ncclGroupEnd`).
    GroupedRendezvous,
    /// A send returns only when the receive meets it, and nothing is posted together.
    PlainRendezvous,
}

impl std::fmt::Display for Transfers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Transfers::Buffered => "buffered",
            Transfers::GroupedRendezvous => "grouped rendezvous",
            Transfers::PlainRendezvous => "plain rendezvous",
        })
    }
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

    /// Runs all stages against each other with the given kind of transfer.
    ///
    /// Between two actions a stage sends the output of the first and receives the input of the
    /// second, in this order or, where the kind of transfer and the neighbour allow, at once.
    pub fn simulate(&self, transfers: Transfers) -> Result<(), ScheduleError> {
        let programs: Vec<_> = (0..self.stages.len())
            .map(|rank| self.exchanges(rank, transfers))
            .collect();
        let mut run = Run {
            buffered: transfers == Transfers::Buffered,
            next: vec![0; programs.len()],
            posted: vec![Vec::new(); programs.len()],
            sent: HashSet::new(),
            programs: &programs,
        };
        loop {
            let mut moved = false;
            for rank in 0..programs.len() {
                while run.advance(rank) {
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        match run.posted.iter().position(|posted| !posted.is_empty()) {
            None => Ok(()),
            Some(rank) => Err(ScheduleError::Deadlock {
                transfers,
                rank,
                action: run.posted[rank][0].0,
            }),
        }
    }

    /// The transfers of one stage in order; those of one inner list are posted together.
    fn exchanges(&self, rank: usize, transfers: Transfers) -> Vec<Vec<Message>> {
        let actions = &self.stages[rank];
        let mut exchanges = Vec::new();
        for place in 0..=actions.len() {
            let done = place.checked_sub(1).map(|before| actions[before]);
            let send_to = done.and_then(|action| Some((action, self.destination(rank, action)?)));
            let ahead = actions.get(place).copied();
            let receive_from = ahead.and_then(|action| Some((action, self.source(rank, action)?)));
            let send = send_to.map(|(action, to)| Message(action, rank, to));
            let receive = receive_from.map(|(action, from)| Message(action, from, rank));
            match (send, receive) {
                (Some(send), Some(receive))
                    if transfers == Transfers::GroupedRendezvous && send.2 == receive.1 =>
                {
                    exchanges.push(vec![send, receive]);
                }
                (send, receive) => {
                    exchanges.extend(send.into_iter().chain(receive).map(|message| vec![message]));
                }
            }
        }
        exchanges
    }
}

fn forwards(action: &Action) -> bool {
    matches!(action, Action::Forward(_))
}

fn backwards(action: &Action) -> bool {
    matches!(action, Action::Backward(_))
}

/// Input or output of an action, from one stage to another.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Message(Action, usize, usize);

/// A simulated run: compute takes no time, only transfers can hold a stage up.
struct Run<'a> {
    buffered: bool,
    programs: &'a [Vec<Vec<Message>>],
    /// Per stage, the exchange that comes next.
    next: Vec<usize>,
    /// Per stage, what it has posted and still waits for.
    posted: Vec<Vec<Message>>,
    /// Messages that lie in a buffer.
    sent: HashSet<Message>,
}

impl Run<'_> {
    /// Moves one stage on by one transfer or one exchange; `false` when it cannot move.
    fn advance(&mut self, rank: usize) -> bool {
        if self.posted[rank].is_empty() {
            let Some(exchange) = self.programs[rank].get(self.next[rank]) else {
                return false;
            };
            self.posted[rank].clone_from(exchange);
            self.next[rank] += 1;
            return true;
        }
        let Some(place) = (0..self.posted[rank].len()).find(|&i| self.can_finish(rank, i)) else {
            return false;
        };
        let message = self.posted[rank].remove(place);
        let Message(_, from, to) = message;
        if self.buffered {
            if rank == from {
                self.sent.insert(message);
            }
        } else {
            let peer = if rank == from { to } else { from };
            self.posted[peer].retain(|other| *other != message);
        }
        true
    }

    fn can_finish(&self, rank: usize, place: usize) -> bool {
        let message = self.posted[rank][place];
        let Message(_, from, to) = message;
        if self.buffered {
            return rank == from || self.sent.contains(&message);
        }
        let peer = if rank == from { to } else { from };
        self.posted[peer].contains(&message)
    }
}
