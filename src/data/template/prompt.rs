//! Prompts as ChatGLM-6B was asked: for training rows and for chats alike.

use crate::data::tokenizer::RoundStyle;

/// One earlier question with its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// What was asked.
    pub query: String,
    /// What was answered.
    pub answer: String,
}

/// The prompt of an instruction; `input` is left out when empty.
pub fn alpaca_prompt(instruction: &str, input: &str) -> String {
    let mut prompt = format!("Instruction: {instruction}\n");
    if !input.is_empty() {
        prompt.push_str("Input: ");
        prompt.push_str(input);
        prompt.push('\n');
    }
    prompt.push_str("Answer: ");
    prompt
}

/// The prompt of a query after earlier turns, in ChatGLM-6B's rounds, counted from 0. Without turns
/// it is the bare query, unless `round_for_empty_history`.
pub fn round_prompt(history: &[Turn], query: &str, round_for_empty_history: bool) -> String {
    if history.is_empty() && !round_for_empty_history {
        return query.to_owned();
    }
    let turns = history.iter();
    let turns = turns.map(|turn| (turn.query.as_str(), turn.answer.as_str()));
    RoundStyle::CHATGLM.prompt(turns, query)
}
