//! Rows in memory: checked, cut to what can matter, held flat.

use super::RowProblem;
use super::positions::{Positions, check_length, check_reach, settle};
use crate::config::model::ModelConfig;

/// Stands in place of a label where nothing is to be predicted (-100 in files).
pub const NO_LABEL: u32 = u32::MAX;

/// A row as its source gives it, not yet checked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawRow {
    /// Token ids.
    pub input_ids: Vec<i64>,
    /// Per token its own id where it is to be predicted (from the token before), else -100.
    pub labels: Vec<i64>,
    /// Keys `0..context_length` are visible to all queries; the index of the first sop if absent.
    pub context_length: Option<usize>,
    /// Positions in the context and inside the block; by ChatGLM-6B's rule if absent.
    pub position_ids: Option<[Vec<u32>; 2]>,
}

/// One checked row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Token ids, `[T]`.
    pub input_ids: &'a [u32],
    /// Labels, `[T]`; [`NO_LABEL`] where nothing is predicted.
    pub labels: &'a [u32],
    /// Keys `0..context_length` are visible to all queries of the row.
    pub context_length: usize,
    /// Both positions of every token.
    pub positions: Positions<'a>,
}

impl Row<'_> {
    /// What is predicted: (index of the token before, id).
    pub fn targets(&self) -> impl Iterator<Item = (usize, u32)> {
        let next = self.labels.iter().skip(1).copied().enumerate();
        next.filter(|&(_, id)| id != NO_LABEL)
    }
}

/// A checked prompt, to be continued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptRow {
    /// Token ids, `[T]`.
    pub input_ids: Vec<u32>,
    /// Keys `0..context_length` are visible to all queries of the row.
    pub context_length: usize,
    /// Position in the context and inside the block, `[T]`.
    pub positions: Vec<(u32, u32)>,
}

impl PromptRow {
    /// Checks a prompt against the model; `labels` are not looked at.
    pub fn new(row: &RawRow, model: &ModelConfig) -> Result<Self, RowProblem> {
        let input_ids = token_ids(&row.input_ids, model)?;
        let given = row.position_ids.as_ref();
        let (context_length, positions) = settle(&input_ids, row.context_length, given, model)?;
        check_reach(input_ids.len(), positions, model)?;
        Ok(Self {
            positions: (0..input_ids.len()).map(|t| positions.at(t)).collect(),
            context_length,
            input_ids,
        })
    }
}

/// The checked rows of one data set, held flat: eight bytes per token and a little per row.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    input_ids: Vec<u32>,
    labels: Vec<u32>,
    /// Given positions only: those in the context, then those in the block, row after row.
    positions: Vec<u32>,
    held: Vec<Held>,
    targets: usize,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    start: usize,
    tokens: usize,
    targets: usize,
    context_length: usize,
    positions: HeldPositions,
}

#[derive(Clone, Copy, Debug)]
enum HeldPositions {
    Rule { mask: u32, sop: u32 },
    Given { start: usize },
}

impl Rows {
    /// Checks a row against the model and adds it, cut after its last target: what stands behind
    /// that can influence nothing, unless it belongs to the context.
    ///
    /// # Errors
    /// What is wrong with the row; nothing is added then.
    pub fn push(&mut self, row: &RawRow, model: &ModelConfig) -> Result<(), RowProblem> {
        let input_ids = token_ids(&row.input_ids, model)?;
        check_length("labels", row.labels.len(), input_ids.len())?;
        let labels = label_ids(&row.labels, model)?;
        let given = row.position_ids.as_ref();
        let (context_length, positions) = settle(&input_ids, row.context_length, given, model)?;
        let last = labels.iter().rposition(|&label| label != NO_LABEL);
        let last = last.filter(|&last| last > 0).ok_or(RowProblem::NoTarget)?;
        let tokens = context_length.max(last + 1);
        check_reach(tokens, positions, model)?;

        let positions = match positions {
            Positions::Rule { mask, sop } => HeldPositions::Rule { mask, sop },
            Positions::Given { context, block } => {
                let start = self.positions.len();
                self.positions.extend(&context[..tokens]);
                self.positions.extend(&block[..tokens]);
                HeldPositions::Given { start }
            }
        };
        let held = Held {
            start: self.input_ids.len(),
            tokens,
            targets: labels[1..].iter().filter(|&&id| id != NO_LABEL).count(),
            context_length,
            positions,
        };
        self.input_ids.extend(&input_ids[..tokens]);
        self.labels.extend(&labels[..tokens]);
        self.targets += held.targets;
        self.held.push(held);
        Ok(())
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The row at `index`, or `None` past the end.
    pub fn get(&self, index: usize) -> Option<Row<'_>> {
        let held = self.held.get(index)?;
        let tokens = held.start..held.start + held.tokens;
        let positions = match held.positions {
            HeldPositions::Rule { mask, sop } => Positions::Rule { mask, sop },
            HeldPositions::Given { start } => Positions::Given {
                context: &self.positions[start..start + held.tokens],
                block: &self.positions[start + held.tokens..start + 2 * held.tokens],
            },
        };
        Some(Row {
            input_ids: &self.input_ids[tokens.clone()],
            labels: &self.labels[tokens],
            context_length: held.context_length,
            positions,
        })
    }

    /// Tokens of every row.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> {
        self.held.iter().map(|held| held.tokens)
    }

    /// Targets of every row.
    pub fn target_counts(&self) -> impl ExactSizeIterator<Item = usize> {
        self.held.iter().map(|held| held.targets)
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Targets of all rows.
    pub fn targets(&self) -> usize {
        self.targets
    }

    /// Share of the tokens at which something is predicted, 0 to 1.
    pub fn target_share(&self) -> f64 {
        self.targets as f64 / self.tokens().max(1) as f64
    }
}

fn token_ids(ids: &[i64], model: &ModelConfig) -> Result<Vec<u32>, RowProblem> {
    if ids.is_empty() {
        return Err(RowProblem::Empty);
    }
    let one = |(index, &id)| checked("input_ids", index, id, model);
    ids.iter().enumerate().map(one).collect()
}

fn label_ids(labels: &[i64], model: &ModelConfig) -> Result<Vec<u32>, RowProblem> {
    let one = |(index, &id)| match id {
        -100 => Ok(NO_LABEL),
        id => checked("labels", index, id, model),
    };
    labels.iter().enumerate().map(one).collect()
}

fn checked(
    name: &'static str,
    index: usize,
    found: i64,
    model: &ModelConfig,
) -> Result<u32, RowProblem> {
    let id = u32::try_from(found).ok().filter(|&id| id != NO_LABEL);
    id.filter(|&id| (id as usize) < model.vocab_size)
        .ok_or(RowProblem::Id {
            name,
            index,
            found,
            vocab_size: model.vocab_size,
        })
}
