//! The rows of a data set: checked, cut to what can matter, held flat, in memory or in a mapped file.

use std::sync::Arc;

use super::RowProblem;
use super::positions::{Positions, check_reach, settle};
use crate::config::model::ModelConfig;

mod check;
mod entry;
mod selection;
mod store;

use check::token_ids;
pub(super) use entry::{EntryWords, RowEntry};
use selection::Selection;
pub(super) use store::{RowBlock, Store};

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

/// The checked rows of one data set, held flat: eight bytes per token and 32 per row. Copies share
/// what is held.
#[derive(Clone, Debug, Default)]
pub struct Rows {
    store: Store,
    selection: Selection,
    tokens: usize,
    targets: usize,
}

impl Rows {
    /// The rows of a store, which have so many tokens and targets together.
    pub(super) fn held(store: Store, tokens: usize, targets: usize) -> Self {
        Self {
            store,
            selection: Selection::All,
            tokens,
            targets,
        }
    }

    /// Checks a row against the model and adds it, cut after its last target: what stands behind
    /// that can influence nothing, unless it belongs to the context. Rows that lie in a file, or are
    /// a part of others, are copied into memory first.
    ///
    /// # Errors
    /// What is wrong with the row; nothing is added then.
    pub fn push(&mut self, row: &RawRow, model: &ModelConfig) -> Result<(), RowProblem> {
        let mut block = match (std::mem::take(&mut self.store), &self.selection) {
            (Store::Memory(block), Selection::All) => block,
            (store, _) => {
                self.store = store;
                Arc::new(self.copied())
            }
        };
        self.selection = Selection::All;
        let pushed = Arc::make_mut(&mut block).push(row, model);
        self.store = Store::Memory(block);
        let entry = pushed?;
        self.tokens += entry.tokens as usize;
        self.targets += entry.targets as usize;
        Ok(())
    }

    fn copied(&self) -> RowBlock {
        let mut block = RowBlock::default();
        for entry in (0..self.len()).filter_map(|index| self.entry(index)) {
            let words = self.store.words().get(entry.range());
            block.append(entry, words.unwrap_or_default());
        }
        block
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.selection.len(self.store.len())
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The row at `index`, or `None` past the end.
    pub fn get(&self, index: usize) -> Option<Row<'_>> {
        let entry = self.entry(index)?;
        let words = self.store.words().get(entry.range())?;
        let tokens = entry.tokens as usize;
        let mut lists = words.chunks_exact(tokens.max(1));
        Some(Row {
            input_ids: lists.next()?,
            labels: lists.next()?,
            context_length: entry.context_length as usize,
            positions: match entry.rule {
                Some((mask, sop)) => Positions::Rule { mask, sop },
                None => Positions::Given {
                    context: lists.next()?,
                    block: lists.next()?,
                },
            },
        })
    }

    fn entry(&self, index: usize) -> Option<RowEntry> {
        self.store.entry(self.selection.held(index)?)
    }

    fn entries(&self) -> impl ExactSizeIterator<Item = RowEntry> {
        // Every index below the length has an entry.
        let none = RowEntry::from_words(EntryWords::default());
        (0..self.len()).map(move |index| self.entry(index).unwrap_or(none))
    }

    /// Tokens of the row at `index`, 0 past the end; without touching the row itself.
    pub fn length(&self, index: usize) -> usize {
        self.entry(index).map_or(0, |entry| entry.tokens as usize)
    }

    /// Tokens of every row.
    pub fn lengths(&self) -> impl ExactSizeIterator<Item = usize> {
        self.entries().map(|entry| entry.tokens as usize)
    }

    /// Targets of every row.
    pub fn target_counts(&self) -> impl ExactSizeIterator<Item = usize> {
        self.entries().map(|entry| entry.targets as usize)
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Targets of all rows.
    pub fn targets(&self) -> usize {
        self.targets
    }

    /// Share of the tokens at which something is predicted, 0 to 1.
    pub fn target_share(&self) -> f64 {
        self.targets as f64 / self.tokens().max(1) as f64
    }

    /// A checksum of all rows in their order: ids, labels, positions and contexts. It is made of
    /// those of the rows, which were taken when they were checked, so that the rows of a file are
    /// not read for it.
    pub fn checksum(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        for entry in self.entries() {
            hasher.update(&entry.crc32.to_le_bytes());
        }
        hasher.finalize()
    }

    /// Two parts without a row in common: all rows but those at `taken`, and those, both in the
    /// order of the rows. What is no row, or named twice, takes nothing.
    pub fn split_off(&self, mut taken: Vec<usize>) -> (Rows, Rows) {
        taken.sort_unstable();
        taken.dedup();
        taken.truncate(taken.partition_point(|&index| index < self.len()));
        let held = |index: &usize| self.selection.held(*index);
        let (rest, taken) = match &self.selection {
            Selection::All => {
                let taken: Arc<[usize]> = taken.into();
                (Selection::Without(Arc::clone(&taken)), taken)
            }
            _ => {
                let left = (0..self.len()).filter(|index| taken.binary_search(index).is_err());
                let left = left.filter_map(|index| held(&index)).collect();
                (
                    Selection::Only(left),
                    taken.iter().filter_map(held).collect(),
                )
            }
        };
        let entries = taken.iter().filter_map(|&held| self.store.entry(held));
        let (tokens, targets) = entries.fold((0, 0), |(tokens, targets), entry| {
            let (more_tokens, more_targets) = (entry.tokens as usize, entry.targets as usize);
            (tokens + more_tokens, targets + more_targets)
        });
        let part = |selection, tokens, targets| Rows {
            store: self.store.clone(),
            selection,
            tokens,
            targets,
        };
        (
            part(rest, self.tokens - tokens, self.targets - targets),
            part(Selection::Only(taken), tokens, targets),
        )
    }
}
