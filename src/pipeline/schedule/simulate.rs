//! A run of a schedule without computing: would every stage come to its end, and when?

use super::graph::Graph;
use super::{Action, Flow, Operation, Schedule, ScheduleError};

/// How a simulated run of the programs ([`Schedule::program`]) moves data between stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfers {
    /// A send is done at once, as into a channel without bound; a run waits for its input.
    Buffered,
    /// As NCCL: each flow is a communicator of its own, whose exchanges happen in order on every
    /// stage. An exchange begins when everything that its stage was told to compute before it is
    /// computed, and ends when its send has met the receive and its receive the send of an exchange
    /// that has begun too. A run waits for the last exchange of its flow; what comes after in the
    /// program but belongs to the other flow does not.
    Grouped,
    /// As peer copies: a message waits at its sender until the receiver's run takes it, and the sender
    /// stops at the next message of the same flow until then.
    Mailbox,
    /// A send ends only when the receive meets it, both stop their stage, and nothing is posted
    /// together: what a program must not be run with.
    PlainRendezvous,
}

impl std::fmt::Display for Transfers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Transfers::Buffered => "buffered",
            Transfers::Grouped => "grouped",
            Transfers::Mailbox => "mailbox",
            Transfers::PlainRendezvous => "plain rendezvous",
        })
    }
}

impl Schedule {
    /// Runs the programs of all stages against each other with the given kind of transfer.
    ///
    /// # Errors
    /// [`ScheduleError::Deadlock`] where a stage does not come to its end.
    pub fn simulate(&self, transfers: Transfers) -> Result<(), ScheduleError> {
        let ends = self.ends(transfers, |_| 0.0, |_, _| 0.0, 0.0);
        for (rank, (actions, ends)) in self.stages.iter().zip(&ends).enumerate() {
            if let Some(place) = ends.iter().position(Option::is_none) {
                return Err(ScheduleError::Deadlock {
                    transfers,
                    rank,
                    action: actions[place],
                });
            }
        }
        Ok(())
    }

    /// When each action of each stage ends, counted from 0, with everything as early as it can be;
    /// nothing for an action that never begins. `begin` is when a stage can begin, `cost` the time that it
    /// computes for an action, `transfer` that of a message.
    pub(super) fn ends(
        &self,
        transfers: Transfers,
        begin: impl Fn(usize) -> f64,
        cost: impl Fn(usize, Action) -> f64,
        transfer: f64,
    ) -> Vec<Vec<Option<f64>>> {
        let messages = self.number(Flow::Backward, self.virtual_count(), 0);
        let mut run = Run {
            schedule: self,
            transfers,
            graph: Graph::new(2 * messages, transfer),
            messages,
        };
        let parties = match transfers {
            Transfers::Buffered | Transfers::Mailbox => 1,
            Transfers::Grouped | Transfers::PlainRendezvous => 2,
        };
        for message in 0..messages {
            run.graph.await_parties(message, parties);
        }
        let events: Vec<Vec<usize>> = (0..self.stages.len())
            .map(|rank| run.stage(rank, begin(rank), &cost))
            .collect();
        let ends = run.graph.ends();
        let of_stage = |events: &Vec<usize>| events.iter().map(|&event| ends[event]).collect();
        events.iter().map(of_stage).collect()
    }

    fn virtual_count(&self) -> usize {
        self.stages.len() * self.virtual_stages
    }

    /// A number for the work of `virtual_stage` on a micro-batch, and for the message it waits for.
    fn number(&self, flow: Flow, virtual_stage: usize, micro_batch: usize) -> usize {
        let before = match flow {
            Flow::Forward => 0,
            Flow::Backward => self.virtual_count(),
        };
        (before + virtual_stage) * self.micro_batches + micro_batch
    }
}

/// A simulated run. Event `n` is the message that is input `n`, event `messages + n` the work on it.
struct Run<'a> {
    schedule: &'a Schedule,
    transfers: Transfers,
    graph: Graph,
    messages: usize,
}

/// What one flow of a stage has done last.
#[derive(Clone, Copy, Default)]
struct Lane {
    action: Option<Action>,
    /// The end of its last exchange.
    exchange: Option<usize>,
    /// The number of its last message.
    message: Option<usize>,
}

impl Run<'_> {
    /// Adds what stage `rank` does from `begin` on and what it waits for; the events of its actions.
    fn stage(
        &mut self,
        rank: usize,
        begin: f64,
        cost: impl Fn(usize, Action) -> f64,
    ) -> Vec<usize> {
        let mut works = Vec::with_capacity(self.schedule.stages[rank].len());
        let ready = self.graph.add();
        self.graph.set_duration(ready, begin);
        // What the next operation comes after, whatever its flow.
        let mut last = Some(ready);
        let mut lanes = [Lane::default(); 2];
        for operation in self.schedule.program(rank) {
            match operation {
                Operation::Run(action) => {
                    let lane = &mut lanes[action.flow as usize];
                    let input = self.input(rank, action);
                    let work = match input {
                        Some(input) => self.messages + input,
                        None => self.never(),
                    };
                    self.graph.set_duration(work, cost(rank, action));
                    self.graph.after(work, last);
                    if self.transfers == Transfers::Grouped {
                        self.graph.after(work, lane.exchange);
                    } else if self.schedule.source(rank, action).is_some() {
                        self.graph.after(work, input);
                    }
                    lane.action = Some(action);
                    last = Some(work);
                    works.push(work);
                }
                Operation::Exchange {
                    flow,
                    send,
                    receive,
                } => {
                    let lane = &mut lanes[flow as usize];
                    let sent = lane.action.filter(|_| send.is_some());
                    let sent = sent.and_then(|action| self.output(rank, action));
                    let received = receive.and_then(|(_, action)| self.input(rank, action));
                    last = self.exchange(lane, sent, received, last);
                }
            }
        }
        works
    }

    /// Adds an exchange; what the next operation of the stage comes after.
    fn exchange(
        &mut self,
        lane: &mut Lane,
        sent: Option<usize>,
        received: Option<usize>,
        last: Option<usize>,
    ) -> Option<usize> {
        match self.transfers {
            Transfers::Buffered => {
                if let Some(message) = sent {
                    self.graph.join(message, last);
                }
                last
            }
            Transfers::Mailbox => {
                let Some(message) = sent else { return last };
                self.graph.join(message, last);
                let taken = lane.message.map(|before| self.messages + before);
                self.graph.after(message, taken);
                lane.message = sent;
                sent
            }
            Transfers::Grouped => {
                let (begin, end) = (self.graph.add(), self.graph.add());
                // The exchange before it is over: the run between the two has waited for it.
                self.graph.after(begin, last);
                self.graph.after(end, Some(begin));
                for message in sent.into_iter().chain(received) {
                    self.graph.join(message, Some(begin));
                    self.graph.after(end, Some(message));
                }
                lane.exchange = Some(end);
                last
            }
            Transfers::PlainRendezvous => {
                let mut last = last;
                for message in sent.into_iter().chain(received) {
                    self.graph.join(message, last);
                    last = Some(message);
                }
                last
            }
        }
    }

    /// Number of the message that `action` on stage `rank` waits for. None of an action that the
    /// step does not have.
    fn input(&self, rank: usize, action: Action) -> Option<usize> {
        let schedule = self.schedule;
        let known =
            action.micro_batch < schedule.micro_batches && action.chunk < schedule.virtual_stages;
        let virtual_stage = action.chunk * schedule.stages.len() + rank;
        known.then(|| schedule.number(action.flow, virtual_stage, action.micro_batch))
    }

    /// Number of the message that `action` on stage `rank` makes, where another stage waits for it.
    fn output(&self, rank: usize, action: Action) -> Option<usize> {
        let input = self.input(rank, action)?;
        let step = self.schedule.micro_batches;
        Some(match action.flow {
            Flow::Forward => input + step,
            Flow::Backward => input - step,
        })
    }

    /// An event that waits for ever.
    fn never(&mut self) -> usize {
        let event = self.graph.add();
        self.graph.await_parties(event, 1);
        event
    }
}
