//! Which of the rows held belong to a data set: all, some, or all but some.

use std::sync::Arc;

/// A selection of rows, in the order of the rows held.
#[derive(Clone, Debug, Default)]
pub(super) enum Selection {
    /// Every row.
    #[default]
    All,
    /// These rows, ascending.
    Only(Arc<[usize]>),
    /// Every row but these, ascending. It costs memory by the rows left out, which are the few.
    Without(Arc<[usize]>),
}

impl Selection {
    /// Number of rows selected of `held` rows.
    pub fn len(&self, held: usize) -> usize {
        match self {
            Self::All => held,
            Self::Only(rows) => rows.len(),
            Self::Without(rows) => held - rows.len(),
        }
    }

    /// The row held that the selection's row `index` is.
    pub fn held(&self, index: usize) -> Option<usize> {
        match self {
            Self::All => Some(index),
            Self::Only(rows) => rows.get(index).copied(),
            Self::Without(rows) => {
                // Before the row left out as number k, rows[k] - k rows remain.
                let (mut from, mut to) = (0, rows.len());
                while from < to {
                    let middle = from.midpoint(to);
                    if rows[middle] - middle <= index {
                        from = middle + 1;
                    } else {
                        to = middle;
                    }
                }
                Some(index + from)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_and_what_is_kept_make_the_whole() {
        for mask in 0_u32..1 << 7 {
            let chosen: Vec<usize> = (0..7).filter(|row| mask >> row & 1 == 1).collect();
            let rest: Vec<usize> = (0..7).filter(|row| mask >> row & 1 == 0).collect();
            for (selection, expected) in [
                (Selection::Only(chosen.clone().into()), &chosen),
                (Selection::Without(chosen.clone().into()), &rest),
            ] {
                assert_eq!(selection.len(7), expected.len());
                let held = (0..expected.len()).filter_map(|index| selection.held(index));
                assert_eq!(held.collect::<Vec<_>>(), *expected);
            }
        }
    }
}
