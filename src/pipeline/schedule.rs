//! Pipeline schedules as plain data.

/// One unit of work of one stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Forward of a micro-batch (index inside the step).
    Forward(usize),
    /// Backward of a micro-batch.
    Backward(usize),
}
