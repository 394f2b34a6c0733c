//! Questions and answers as token ids: the rows of a run, and prompts.

use std::path::Path;

use serde_json::json;

use super::corpus::Question;
use super::{DemoError, files};
use crate::data::rows::RawRow;
use crate::data::tokenizer::GlmTokenizer;

/// Stands where nothing is to be predicted.
const NO_TARGET: i64 = -100;

/// Writes a run's rows as pre-tokenised JSONL: question, gMASK, sop, answer, eop; the targets are
/// sop and what follows.
///
/// # Errors
/// The file cannot be written.
pub fn write(
    path: &Path,
    tokenizer: &GlmTokenizer,
    questions: &[Question],
) -> Result<(), DemoError> {
    let mut text = String::new();
    for question in questions {
        let answer = tokenizer.encode(&question.answer);
        let ids = tokenizer.build_inputs(&tokenizer.encode(&question.question), Some(&answer));
        // sop, the answer, eop.
        let context = ids.len() - answer.len() - 2;
        let labels = vec![NO_TARGET; context].into_iter();
        let labels = labels.chain(ids[context..].iter().map(|&id| i64::from(id)));
        let labels: Vec<i64> = labels.collect();
        text += &json!({ "input_ids": ids, "labels": labels }).to_string();
        text.push('\n');
    }
    files::write(path, text.as_bytes())
}

/// The ids that a question is asked with.
pub fn prompt(tokenizer: &GlmTokenizer, question: &Question) -> RawRow {
    let ids = tokenizer.build_inputs(&tokenizer.encode(&question.question), None);
    RawRow {
        input_ids: ids.into_iter().map(i64::from).collect(),
        ..RawRow::default()
    }
}
