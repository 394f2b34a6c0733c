//! Where tokens stand: two positions per token and the length of the visible context.

use super::RowProblem;
use crate::config::model::ModelConfig;

/// The two positions of every token of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions<'a> {
    /// ChatGLM-6B's rule, or with sop at [`NEVER`] that of later generations. In the context: the index of the token, and from sop on the index of the
    /// mask token. In the block: 0, and from sop on 1, 2, 3, ..
    Rule {
        /// Index of the first `[gMASK]`, or of the first `[MASK]` where there is none.
        mask: u32,
        /// Index of the first sop.
        sop: u32,
    },
    /// As the data gives them, `[T]` each.
    Given {
        /// Positions in the context.
        context: &'a [u32],
        /// Positions inside the block.
        block: &'a [u32],
    },
}

impl Positions<'_> {
    /// Position in the context and inside the block of the token at `index`, which is in the row.
    pub fn at(&self, index: usize) -> (u32, u32) {
        match *self {
            Positions::Rule { mask, sop } => {
                let index = index as u32;
                if index < sop {
                    (index, 0)
                } else {
                    (mask, index - sop + 1)
                }
            }
            Positions::Given { context, block } => (context[index], block[index]),
        }
    }
}

/// Stands in place of the index of sop where positions do not change there: they count on.
pub const NEVER: u32 = u32::MAX - 1;

/// Positions of the token that follows one with these positions, while an answer is written: inside
/// a block the place in the context stays and the place inside the block moves on; else the former does.
pub fn next_positions((context, block): (u32, u32)) -> (u32, u32) {
    match block {
        0 => (context.saturating_add(1), 0),
        _ => (context, block.saturating_add(1)),
    }
}

/// Settles context length and positions of a row: as given where given, else by the model's rule.
///
/// # Errors
/// When a given length does not fit the row, or the rule finds no sop or no mask token.
pub fn settle<'a>(
    input_ids: &[u32],
    context_length: Option<usize>,
    position_ids: Option<&'a [Vec<u32>; 2]>,
    model: &ModelConfig,
) -> Result<(usize, Positions<'a>), RowProblem> {
    let tokens = input_ids.len();
    if let Some(found) = context_length.filter(|&length| length > tokens) {
        return Err(RowProblem::Context { found, tokens });
    }
    let given = match position_ids {
        Some([context, block]) => {
            check_length("position_ids[0]", context.len(), tokens)?;
            check_length("position_ids[1]", block.len(), tokens)?;
            Some(Positions::Given { context, block })
        }
        None => None,
    };
    let Some(ids) = model.context_ids else {
        let counted = Positions::Rule {
            mask: 0,
            sop: NEVER,
        };
        return Ok((context_length.unwrap_or(0), given.unwrap_or(counted)));
    };
    let find = |id: u32| input_ids.iter().position(|&other| other == id);
    let sop = find(ids.bos_token_id).ok_or(RowProblem::NoSop {
        bos_token_id: ids.bos_token_id,
    });
    let positions = match given {
        Some(given) => given,
        None => {
            let mask = find(ids.gmask_token_id).or_else(|| find(ids.mask_token_id));
            let mask = mask.ok_or(RowProblem::NoMask {
                gmask_token_id: ids.gmask_token_id,
                mask_token_id: ids.mask_token_id,
            });
            Positions::Rule {
                sop: sop.clone()? as u32,
                mask: mask? as u32,
            }
        }
    };
    Ok((context_length.map_or(sop, Ok)?, positions))
}

/// Checks that the first `tokens` tokens of a row, and their positions, are within the model's
/// reach.
pub fn check_reach(
    tokens: usize,
    positions: Positions<'_>,
    model: &ModelConfig,
) -> Result<(), RowProblem> {
    let limit = model.max_sequence_length;
    if tokens > limit {
        return Err(RowProblem::TooLong { tokens, limit });
    }
    if let Positions::Given { context, block } = positions {
        for (list, values) in [context, block].into_iter().enumerate() {
            let mut kept = values.iter().take(tokens);
            if let Some(index) = kept.position(|&value| value as usize >= limit) {
                return Err(RowProblem::Position {
                    list,
                    index,
                    found: values[index],
                    limit,
                });
            }
        }
    }
    Ok(())
}

/// Checks that a list has an entry for each token.
pub fn check_length(name: &'static str, found: usize, expected: usize) -> Result<(), RowProblem> {
    if found == expected {
        return Ok(());
    }
    Err(RowProblem::Length {
        name,
        found,
        expected,
    })
}
