//! The micro-batch as the engine sees it: real tokens only, flat, with sequence offsets.

/// One sequence inside a [`MicroBatch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence {
    /// Row of its first token in the flat list.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
    /// Keys `0..context_length` of the sequence are visible to all its queries; later keys are causal.
    pub context_length: usize,
}

/// A row that has something to predict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Row in the flat list whose logits are compared.
    pub row: u32,
    /// The id to be predicted there: the label of the *next* token.
    pub id: u32,
}

/// Several sequences, unpadded, one after another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids, `[T]`.
    pub input_ids: Vec<u32>,
    /// Position in the context, `[T]` (first row of the original `position_ids`).
    pub position: Vec<u32>,
    /// Position inside the block that is being written, `[T]` (second row of `position_ids`).
    pub block_position: Vec<u32>,
    /// The sequences, in order, covering all `T` rows.
    pub sequences: Vec<Sequence>,
    /// The rows with a target, ascending.
    pub targets: Vec<Target>,
}
