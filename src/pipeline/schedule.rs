//! Pipeline schedules as plain data: what every stage does, in which order.
//!
//! Sends and receives are not listed; they follow from the actions. A forward on stage `r` receives
//! its input from `r - 1` and sends its output to `r + 1`; a backward goes the other way. Every
//! stage runs forwards in ascending micro-batch order, and backwards too: gradients are then added
//! in the same order by every schedule at every number of stages, to the same bits.

use std::fmt;
use std::ops::Range;

use crate::config::run::ScheduleKind;
use crate::model::stage::ChunkShape;

mod graph;
mod measured;
mod simulate;
mod timeline;
mod validate;

pub use crate::comm::Flow;
pub use measured::ActionTimes;
pub use simulate::Transfers;
pub use timeline::Prediction;
pub use validate::ScheduleError;

/// One unit of work of one stage: a micro-batch through one of its chunks.
///
/// A stage holds v chunks of the model (v = 1 but for the interleaved schedule). Chunk `c` of stage
/// `r` of `p` is virtual stage `c p + r`; a micro-batch goes through the virtual stages in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Action {
    /// Forward or backward pass.
    pub flow: Flow,
    /// Index, inside the step, of the micro-batch that is worked on.
    pub micro_batch: usize,
    /// Index of the chunk on its stage.
    pub chunk: usize,
}

impl Action {
    /// Forward of a micro-batch through a chunk.
    pub fn forward(micro_batch: usize, chunk: usize) -> Self {
        Action {
            flow: Flow::Forward,
            micro_batch,
            chunk,
        }
    }

    /// Backward of a micro-batch through a chunk.
    pub fn backward(micro_batch: usize, chunk: usize) -> Self {
        Action {
            flow: Flow::Backward,
            micro_batch,
            chunk,
        }
    }
}

impl fmt::Display for Action {
    /// `F3`, `B0`; `F3.1` in the second chunk.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = match self.flow {
            Flow::Forward => 'F',
            Flow::Backward => 'B',
        };
        write!(f, "{letter}{}", self.micro_batch)?;
        match self.chunk {
            0 => Ok(()),
            chunk => write!(f, ".{chunk}"),
        }
    }
}

/// What a stage does next: an action, or an exchange with its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Computes.
    Run(Action),
    /// Posts, as one group, the send of what the last action of this flow made and the receive of
    /// what the next one needs. It is not waited for: the next action of the flow waits for the
    /// receive, and the action after that one for the send. Exchanges of one flow happen in order;
    /// the two flows do not wait for each other.
    Exchange {
        /// Which way.
        flow: Flow,
        /// Stage that gets the output of the last action of the flow.
        send: Option<usize>,
        /// Stage that the input of the next action of the flow comes from, and that action.
        receive: Option<(usize, Action)>,
    },
}

/// The actions of all stages for one optimiser step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The rule it was made by, which bounds the slots a stage may have in flight.
    pub kind: ScheduleKind,
    /// Micro-batches in the step.
    pub micro_batches: usize,
    /// Chunks of the model on every stage, v.
    pub virtual_stages: usize,
    /// Per stage, its actions in order.
    pub stages: Vec<Vec<Action>>,
}

impl Schedule {
    /// The schedule of the given kind for `stages` stages of `virtual_stages` chunks each and
    /// `micro_batches` micro-batches.
    ///
    /// # Errors
    /// The interleaved schedule does not exist for these numbers.
    pub fn build(
        kind: ScheduleKind,
        stages: usize,
        virtual_stages: usize,
        micro_batches: usize,
    ) -> Result<Self, ScheduleError> {
        Ok(match kind {
            ScheduleKind::OneForwardOneBackward => {
                Self::one_forward_one_backward(stages, micro_batches)
            }
            ScheduleKind::Gpipe => Self::gpipe(stages, micro_batches),
            ScheduleKind::Interleaved => Self::interleaved(stages, virtual_stages, micro_batches)?,
        })
    }

    /// One forward, one backward (Narayanan et al. 2019, PipeDream-Flush): stage `r` starts with
    /// `p - r - 1` forwards, then alternates, then finishes the backwards that are left.
    pub fn one_forward_one_backward(stages: usize, micro_batches: usize) -> Self {
        let actions = |rank: usize| {
            let ahead = (stages - rank - 1).min(micro_batches);
            alternate(
                ahead,
                (0..micro_batches).map(|i| Action::forward(i, 0)).collect(),
                (0..micro_batches).map(|i| Action::backward(i, 0)).collect(),
            )
        };
        Self {
            kind: ScheduleKind::OneForwardOneBackward,
            micro_batches,
            virtual_stages: 1,
            stages: (0..stages).map(actions).collect(),
        }
    }

    /// All forwards, then all backwards (Huang et al. 2018), the backwards ascending as well.
    pub fn gpipe(stages: usize, micro_batches: usize) -> Self {
        let forwards = (0..micro_batches).map(|i| Action::forward(i, 0));
        let backwards = (0..micro_batches).map(|i| Action::backward(i, 0));
        Self {
            kind: ScheduleKind::Gpipe,
            micro_batches,
            virtual_stages: 1,
            stages: vec![forwards.chain(backwards).collect(); stages],
        }
    }

    /// 1f1b over chunks (Narayanan et al. 2021): groups of p micro-batches go through the first chunk
    /// of every stage, then through the second, and so on; stage `r` starts with
    /// `2 (p - r - 1) + (v - 1) p` forwards. On one stage there is nothing to interleave: 1f1b.
    ///
    /// # Errors
    /// The micro-batches are no multiple of the stages.
    pub fn interleaved(
        stages: usize,
        virtual_stages: usize,
        micro_batches: usize,
    ) -> Result<Self, ScheduleError> {
        if stages > 1 && (!micro_batches.is_multiple_of(stages) || micro_batches == 0) {
            return Err(ScheduleError::NotInterleavable {
                stages,
                micro_batches,
            });
        }
        if stages <= 1 || virtual_stages <= 1 {
            let plain = Self::one_forward_one_backward(stages, micro_batches);
            let kind = ScheduleKind::Interleaved;
            return Ok(Self { kind, ..plain });
        }
        let total = micro_batches * virtual_stages;
        let place = |k: usize| {
            let (group, within) = (k / (stages * virtual_stages), k % (stages * virtual_stages));
            (group * stages + within % stages, within / stages)
        };
        let forward = |k| {
            let (micro_batch, chunk) = place(k);
            Action::forward(micro_batch, chunk)
        };
        let backward = |k| {
            let (micro_batch, chunk) = place(k);
            Action::backward(micro_batch, virtual_stages - 1 - chunk)
        };
        let actions = |rank: usize| {
            let ahead = 2 * (stages - rank - 1) + (virtual_stages - 1) * stages;
            alternate(
                ahead.min(total),
                (0..total).map(forward).collect(),
                (0..total).map(backward).collect(),
            )
        };
        Ok(Self {
            kind: ScheduleKind::Interleaved,
            micro_batches,
            virtual_stages,
            stages: (0..stages).map(actions).collect(),
        })
    }

    /// The stage whose output `action` on stage `rank` waits for; nothing at the model's ends.
    pub fn source(&self, rank: usize, action: Action) -> Option<usize> {
        match action.flow {
            Flow::Forward => self.before(rank, action.chunk),
            Flow::Backward => self.after(rank, action.chunk),
        }
    }

    /// The stage that waits for the output of `action` on stage `rank`; nothing at the model's ends.
    pub fn destination(&self, rank: usize, action: Action) -> Option<usize> {
        match action.flow {
            Flow::Forward => self.after(rank, action.chunk),
            Flow::Backward => self.before(rank, action.chunk),
        }
    }

    /// Stage of the virtual stage before chunk `chunk` of stage `rank`.
    fn before(&self, rank: usize, chunk: usize) -> Option<usize> {
        let virtual_stage = chunk * self.stages.len() + rank;
        let before = virtual_stage.checked_sub(1)?;
        Some(before % self.stages.len())
    }

    /// Stage of the virtual stage after chunk `chunk` of stage `rank`.
    fn after(&self, rank: usize, chunk: usize) -> Option<usize> {
        let after = chunk * self.stages.len() + rank + 1;
        (after < self.stages.len() * self.virtual_stages).then(|| after % self.stages.len())
    }

    /// What stage `rank` does, in order: its actions, with the exchanges that follow from them.
    pub fn program(&self, rank: usize) -> Vec<Operation> {
        let actions = self.stages.get(rank).map_or(&[][..], Vec::as_slice);
        let exchange = |flow: Flow, done: Option<Action>, rest: &[Action]| {
            let next = rest.iter().copied().find(|action| action.flow == flow);
            let send = done.and_then(|action| self.destination(rank, action));
            let receive = next.and_then(|action| Some((self.source(rank, action)?, action)));
            let idle = send.is_none() && receive.is_none();
            (!idle).then_some(Operation::Exchange {
                flow,
                send,
                receive,
            })
        };
        let mut program = Vec::with_capacity(2 * actions.len() + 2);
        program.extend(exchange(Flow::Forward, None, actions));
        program.extend(exchange(Flow::Backward, None, actions));
        for (place, &action) in actions.iter().enumerate() {
            program.push(Operation::Run(action));
            program.extend(exchange(action.flow, Some(action), &actions[place + 1..]));
        }
        program
    }

    /// Slots for saved activations that chunk `chunk` of stage `rank` needs: the most micro-batches
    /// whose forward has run and whose backward has not.
    pub fn slots(&self, rank: usize, chunk: usize) -> usize {
        let actions = self.stages.get(rank).into_iter().flatten();
        most_in_flight(actions.filter(|action| action.chunk == chunk))
    }

    /// The most micro-batches that stage `rank` has in flight at once, summed over its chunks.
    pub fn in_flight(&self, rank: usize) -> usize {
        most_in_flight(self.stages.get(rank).into_iter().flatten())
    }

    /// The chunks of stage `rank`, each with the slots it needs and one at least.
    pub fn chunks(&self, rank: usize, chunks: &[Range<usize>]) -> Vec<ChunkShape> {
        let shape = |(chunk, blocks): (usize, &Range<usize>)| ChunkShape {
            blocks: blocks.clone(),
            slots: self.slots(rank, chunk).max(1),
        };
        chunks.iter().enumerate().map(shape).collect()
    }

    /// Micro-batches in flight that a schedule of this kind promises to keep to on stage `rank`, summed
    /// over its chunks: `min(m, p - rank)` for 1f1b, `m` for gpipe,
    /// `min(m v, 2 (p - rank - 1) + (v - 1) p + 1)` for interleaved.
    pub fn allowed_in_flight(&self, rank: usize) -> usize {
        let (p, v, m) = (self.stages.len(), self.virtual_stages, self.micro_batches);
        match self.kind {
            ScheduleKind::Interleaved if v > 1 => (m * v).min(2 * (p - rank - 1) + (v - 1) * p + 1),
            ScheduleKind::OneForwardOneBackward | ScheduleKind::Interleaved => m.min(p - rank),
            ScheduleKind::Gpipe => m,
        }
    }
}

/// `ahead` forwards, then one forward and one backward by turns, then the backwards that are left.
fn alternate(ahead: usize, forwards: Vec<Action>, backwards: Vec<Action>) -> Vec<Action> {
    let mut actions = forwards[..ahead].to_vec();
    for (&forward, &backward) in forwards[ahead..].iter().zip(&backwards) {
        actions.extend([forward, backward]);
    }
    actions.extend(&backwards[backwards.len() - ahead..]);
    actions
}

/// The most forwards at any time whose backward is still to come.
fn most_in_flight<'a>(actions: impl Iterator<Item = &'a Action>) -> usize {
    let (mut in_flight, mut most) = (0_usize, 0);
    for action in actions {
        match action.flow {
            Flow::Forward => in_flight += 1,
            Flow::Backward => in_flight = in_flight.saturating_sub(1),
        }
        most = most.max(in_flight);
    }
    most
}
