//! One row, checked against the model and cut to what can matter.

use super::entry::RowEntry;
use super::{NO_LABEL, RawRow};
use crate::config::model::ModelConfig;
use crate::data::RowProblem;
use crate::data::positions::{Positions, check_length, check_reach, settle};

/// Checks a row and appends its words to `words`, cut after its last target: what stands behind that
/// can influence nothing, unless it belongs to the context.
///
/// # Errors
/// What is wrong with the row; nothing is appended then.
pub(super) fn append_checked(
    row: &RawRow,
    model: &ModelConfig,
    words: &mut Vec<u32>,
) -> Result<RowEntry, RowProblem> {
    let input_ids = token_ids(&row.input_ids, model)?;
    check_length("labels", row.labels.len(), input_ids.len())?;
    let labels = label_ids(&row.labels, model)?;
    let given = row.position_ids.as_ref();
    let (context_length, positions) = settle(&input_ids, row.context_length, given, model)?;
    let last = labels.iter().rposition(|&label| label != NO_LABEL);
    let last = last.filter(|&last| last > 0).ok_or(RowProblem::NoTarget)?;
    let tokens = context_length.max(last + 1);
    check_reach(tokens, positions, model)?;

    let start = words.len();
    words.extend(&input_ids[..tokens]);
    words.extend(&labels[..tokens]);
    let rule = match positions {
        Positions::Rule { mask, sop } => Some((mask, sop)),
        Positions::Given { context, block } => {
            words.extend(&context[..tokens]);
            words.extend(&block[..tokens]);
            None
        }
    };
    let entry = RowEntry {
        start: start as u64,
        tokens: tokens as u32,
        targets: labels[1..].iter().filter(|&&id| id != NO_LABEL).count() as u32,
        context_length: context_length as u32,
        rule,
        crc32: 0,
    };
    Ok(RowEntry {
        crc32: entry.crc32_of(&words[start..]),
        ..entry
    })
}

/// The ids of a row or a prompt, each one of the model's.
pub(super) fn token_ids(ids: &[i64], model: &ModelConfig) -> Result<Vec<u32>, RowProblem> {
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
