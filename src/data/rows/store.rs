//! Where rows are held: in memory, or in a file that is mapped into it.

use std::sync::Arc;

use super::RawRow;
use super::check::append_checked;
use super::entry::{EntryWords, RowEntry};
use crate::config::model::ModelConfig;
use crate::data::RowProblem;
use crate::data::cache::MappedRows;

/// Rows in memory, in the form they have in a cache file too.
#[derive(Clone, Debug, Default)]
pub(in crate::data) struct RowBlock {
    words: Vec<u32>,
    index: Vec<EntryWords>,
}

impl RowBlock {
    /// Checks a row against the model and adds it.
    ///
    /// # Errors
    /// What is wrong with the row; nothing is added then.
    pub fn push(&mut self, row: &RawRow, model: &ModelConfig) -> Result<RowEntry, RowProblem> {
        let entry = append_checked(row, model, &mut self.words)?;
        self.index.push(entry.to_words());
        Ok(entry)
    }

    /// Adds a row that was checked before.
    pub fn append(&mut self, entry: RowEntry, words: &[u32]) {
        let start = self.words.len() as u64;
        self.index.push(RowEntry { start, ..entry }.to_words());
        self.words.extend(words);
    }

    /// The words of all rows.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.index.len()
    }

    /// The entries of all rows, in order.
    pub fn entries(&self) -> impl Iterator<Item = RowEntry> {
        self.index.iter().copied().map(RowEntry::from_words)
    }
}

/// Where the rows of a data set are held.
#[derive(Clone, Debug)]
pub(in crate::data) enum Store {
    /// In memory.
    Memory(Arc<RowBlock>),
    /// In a cache file.
    Mapped(Arc<MappedRows>),
}

impl Default for Store {
    fn default() -> Self {
        Self::Memory(Arc::default())
    }
}

impl Store {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.index().len()
    }

    /// The entry of a row.
    pub fn entry(&self, index: usize) -> Option<RowEntry> {
        self.index().get(index).copied().map(RowEntry::from_words)
    }

    /// The words of all rows.
    pub fn words(&self) -> &[u32] {
        match self {
            Self::Memory(block) => &block.words,
            Self::Mapped(mapped) => mapped.words(),
        }
    }

    fn index(&self) -> &[EntryWords] {
        match self {
            Self::Memory(block) => &block.index,
            Self::Mapped(mapped) => mapped.index(),
        }
    }
}
