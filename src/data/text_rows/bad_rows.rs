//! Rows that cannot be used: fatal, or counted and set aside.

use serde::{Deserialize, Serialize};

use crate::data::DataError;

/// What happens to a row that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BadRows {
    /// It is counted and left out.
    Skip,
    /// It ends the run, before training begins.
    #[default]
    Fatal,
}

/// The rows that were left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadRowLog {
    policy: BadRows,
    count: usize,
    examples: Vec<String>,
}

/// How many bad rows are shown.
const EXAMPLES: usize = 5;
/// After so many bad rows and no good one, the rest is not looked at.
const GIVE_UP: usize = 1000;

impl BadRowLog {
    /// An empty log.
    pub fn new(policy: BadRows) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// Sets a bad row aside, of which `good` ones came before.
    ///
    /// # Errors
    /// The error itself if bad rows are fatal, or if it is none of a single row;
    /// [`DataError::NoUsableRow`] if all of the first thousand rows are bad.
    pub fn reject(&mut self, error: DataError, good: usize) -> Result<(), DataError> {
        if self.policy == BadRows::Fatal || !matches!(error, DataError::Row { .. }) {
            return Err(error);
        }
        self.count += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(error.to_string());
        }
        if good == 0 && self.count >= GIVE_UP {
            return Err(self.no_usable_row());
        }
        Ok(())
    }

    /// Adds what another log holds, behind this one's.
    pub fn merge(&mut self, other: Self) {
        self.count += other.count;
        let room = EXAMPLES.saturating_sub(self.examples.len());
        self.examples.extend(other.examples.into_iter().take(room));
    }

    /// Number of rows left out.
    pub fn count(&self) -> usize {
        self.count
    }

    /// The first of them, each with file, line and reason.
    pub fn examples(&self) -> &[String] {
        &self.examples
    }

    pub(in crate::data) fn no_usable_row(&self) -> DataError {
        DataError::NoUsableRow {
            rows: self.count,
            examples: self.examples.clone(),
        }
    }
}
