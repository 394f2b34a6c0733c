//! A training row as a question and the answer that is expected.

use crate::config::model::ModelConfig;
use crate::data::rows::{NO_LABEL, PromptRow, Row};

/// What is asked, and what the answer should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Everything before the answer, as it stands in training.
    pub prompt: PromptRow,
    /// The ids of the expected answer, without those that end it.
    pub label: Vec<u32>,
}

impl Asked {
    /// The last turn of a row: its last run of targets is the answer, what stands before is the prompt.
    /// ChatGLM-6B learns sop too, the last id of its prompts: it is asked with it.
    pub fn of(row: &Row<'_>, model: &ModelConfig) -> Self {
        let targets = row.labels.iter().map(|&label| label != NO_LABEL);
        let targets: Vec<bool> = targets.collect();
        let end = targets
            .iter()
            .rposition(|&is| is)
            .map_or(0, |last| last + 1);
        let before = targets[..end].iter().rposition(|&is| !is);
        // Nothing foretells the first id of a row.
        let mut start = before
            .map_or(1, |before| before + 1)
            .min(row.input_ids.len());
        let sop = model.context_ids.map(|ids| ids.bos_token_id);
        if sop.is_some() && row.input_ids.get(start).copied() == sop {
            start += 1;
        }
        let answer = row.input_ids.get(start..end).unwrap_or_default();
        let is_end = |id: &u32| model.eos_token_ids.contains(id);
        let length = answer
            .iter()
            .rposition(|id| !is_end(id))
            .map_or(0, |last| last + 1);
        Asked {
            prompt: PromptRow {
                input_ids: row.input_ids[..start].to_vec(),
                context_length: row.context_length.min(start),
                positions: (0..start).map(|t| row.positions.at(t)).collect(),
            },
            label: answer[..length].to_vec(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::data::rows::{RawRow, Rows};

    const GOLDEN: &str = include_str!("../../tests/golden/chatglm-6b/model/config.json");

    fn asked(input_ids: &[i64], first_targets: &[usize]) -> Asked {
        let model = ModelConfig::from_json(GOLDEN).unwrap();
        let mut rows = Rows::default();
        let label = |(t, &id): (usize, &i64)| match first_targets.contains(&t) {
            true => id,
            false => -100,
        };
        let row = RawRow {
            input_ids: input_ids.to_vec(),
            labels: input_ids.iter().enumerate().map(label).collect(),
            ..RawRow::default()
        };
        rows.push(&row, &model).unwrap();
        Asked::of(&rows.get(0).unwrap(), &model)
    }

    #[test]
    fn the_prompt_ends_where_the_last_answer_begins() {
        // gMASK 191, sop 194, eop 195; sop is learnt, as in every row of text.
        let row = [5, 6, 191, 194, 7, 8, 195];
        let of_text = asked(&row, &[3, 4, 5, 6]);
        assert_eq!(of_text.prompt.input_ids, [5, 6, 191, 194]);
        assert_eq!(
            (of_text.prompt.context_length, of_text.label),
            (3, vec![7, 8])
        );
        assert_eq!(of_text.prompt.positions, [(0, 0), (1, 0), (2, 0), (2, 1)]);
        // Two answers are learnt: the second is asked for, after the first.
        let two = asked(&[5, 191, 194, 7, 195, 6, 8, 9, 195], &[2, 3, 4, 7, 8]);
        assert_eq!(two.prompt.input_ids, [5, 191, 194, 7, 195, 6, 8]);
        assert_eq!(two.label, [9]);
        // An answer that is cut, and one of which nothing is left.
        assert_eq!(asked(&row, &[4, 5]).label, [7, 8]);
        assert!(asked(&[5, 191, 194, 195], &[2, 3]).label.is_empty());
        assert_eq!(
            asked(&[191, 194, 7], &[0, 1, 2]).prompt.input_ids,
            [191, 194]
        );
    }
}
