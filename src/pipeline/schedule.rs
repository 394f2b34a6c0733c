//! Pipeline schedules as plain data: what every stage does, in which order.
//!
//! Sends and receives are not listed; they follow from the actions. A forward on stage `r` receives
//! its input from `r - 1` and sends its output to `r + 1`; a backward goes the other way. Every
//! stage runs forwards in ascending micro-batch order, and backwards too: gradients are then added
//! in the same order by every schedule at every number of stages, to the same bits.

use std::fmt;

use crate::config::run::ScheduleKind;

mod simulate;
mod timeline;
mod validate;

pub use simulate::Transfers;
pub use validate::ScheduleError;

/// One unit of work of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Forward of a micro-batch (index inside the step).
    Forward(usize),
    /// Backward of a micro-batch.
    Backward(usize),
}

impl Action {
    /// Index, inside the step, of the micro-batch that is worked on.
    pub fn micro_batch(self) -> usize {
        match self {
            Action::Forward(micro_batch) | Action::Backward(micro_batch) => micro_batch,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Action::Forward(micro_batch) => write!(f, "F{micro_batch}"),
            Action::Backward(micro_batch) => write!(f, "B{micro_batch}"),
        }
    }
}

/// The actions of all stages for one optimiser step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// The rule it was made by, which bounds the slots a stage may have in flight.
    pub kind: ScheduleKind,
    /// Micro-batches in the step.
    pub micro_batches: usize,
    /// Per stage, its actions in order.
    pub stages: Vec<Vec<Action>>,
}

impl Schedule {
    /// The schedule of the given kind for `stages` stages and `micro_batches` micro-batches.
    pub fn build(kind: ScheduleKind, stages: usize, micro_batches: usize) -> Self {
        match kind {
            ScheduleKind::OneForwardOneBackward => {
                Self::one_forward_one_backward(stages, micro_batches)
            }
            ScheduleKind::Gpipe => Self::gpipe(stages, micro_batches),
        }
    }

    /// One forward, one backward (Narayanan et al. 2019, PipeDream-Flush): stage `r` starts with
    /// `p - r - 1` forwards, then alternates, then finishes the backwards that are left.
    pub fn one_forward_one_backward(stages: usize, micro_batches: usize) -> Self {
        let actions = |rank: usize| {
            let ahead = (stages - rank - 1).min(micro_batches);
            let warm_up = (0..ahead).map(Action::Forward);
            let steady = (ahead..micro_batches)
                .flat_map(|i| [Action::Forward(i), Action::Backward(i - ahead)]);
            let cool_down = (micro_batches - ahead..micro_batches).map(Action::Backward);
            warm_up.chain(steady).chain(cool_down).collect()
        };
        Self {
            kind: ScheduleKind::OneForwardOneBackward,
            micro_batches,
            stages: (0..stages).map(actions).collect(),
        }
    }

    /// All forwards, then all backwards (Huang et al. 2018), the backwards ascending as well.
    pub fn gpipe(stages: usize, micro_batches: usize) -> Self {
        let forwards = (0..micro_batches).map(Action::Forward);
        let backwards = (0..micro_batches).map(Action::Backward);
        Self {
            kind: ScheduleKind::Gpipe,
            micro_batches,
            stages: vec![forwards.chain(backwards).collect(); stages],
        }
    }

    /// The stage whose output `action` on stage `rank` waits for.
    pub fn source(&self, rank: usize, action: Action) -> Option<usize> {
        match action {
            Action::Forward(_) => rank.checked_sub(1),
            Action::Backward(_) => Some(rank + 1).filter(|&next| next < self.stages.len()),
        }
    }

    /// The stage that waits for the output of `action` on stage `rank`.
    pub fn destination(&self, rank: usize, action: Action) -> Option<usize> {
        match action {
            Action::Forward(_) => Some(rank + 1).filter(|&next| next < self.stages.len()),
            Action::Backward(_) => rank.checked_sub(1),
        }
    }

    /// Slots for saved activations that stage `rank` needs: the most micro-batches whose forward
    /// has run and whose backward has not.
    pub fn slots(&self, rank: usize) -> usize {
        let (mut in_flight, mut most) = (0_usize, 0);
        for action in self.stages.get(rank).into_iter().flatten() {
            match action {
                Action::Forward(_) => in_flight += 1,
                Action::Backward(_) => in_flight = in_flight.saturating_sub(1),
            }
            most = most.max(in_flight);
        }
        most
    }

    /// Slots that a schedule of this kind promises to keep to on stage `rank`: `min(m, p - rank)`
    /// for 1f1b, `m` for gpipe.
    pub fn allowed_slots(&self, rank: usize) -> usize {
        match self.kind {
            ScheduleKind::OneForwardOneBackward => self.micro_batches.min(self.stages.len() - rank),
            ScheduleKind::Gpipe => self.micro_batches,
        }
    }
}
