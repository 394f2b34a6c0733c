//! A run of a schedule without computing: would every stage come to its end?

use std::collections::HashSet;

use super::{Action, Schedule, ScheduleError};

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
