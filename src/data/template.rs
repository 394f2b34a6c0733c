//! How a row of a file becomes a prompt and an answer, or a document.

use serde::{Deserialize, Serialize};

use super::TextProblem;
use super::records::{Columns, Content, Documents, Field, history_turns};
use super::text_error::Names;
use super::tokenizer::ChatRole;

mod conversation;
mod messages;
mod prompt;

pub use conversation::{Conversation, Message};
pub use prompt::{Turn, alpaca_prompt, round_prompt};

/// Name of the file that [`TemplateSettings`] are saved as, in the folder of an adapter or of a model
/// that was trained as a whole.
pub const TEMPLATE_FILE: &str = "template.toml";

/// Everything that decides which tokens a row becomes, beside the tokenizer. It is saved with an
/// adapter, so that what was asked in training is asked the same way afterwards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TemplateSettings {
    /// The form of rows, and their columns.
    pub template: Template,
    /// Text in front of every prompt (`source_prefix` of THUDM's scripts).
    pub source_prefix: String,
    /// A prompt is cut to one id less than this, which leaves a place for `[gMASK]`.
    pub max_source_length: usize,
    /// An answer is cut to two ids less than this, which leaves places for sop and eop.
    pub max_target_length: usize,
    /// Which of the assistant's turns are trained on.
    pub train_on_turns: TrainOnTurns,
    /// Whether text that looks like a special token becomes one, as the reference does it. Off, it
    /// stays text.
    pub parse_special: bool,
}

impl Default for TemplateSettings {
    fn default() -> Self {
        Self {
            template: Template::default(),
            source_prefix: String::new(),
            max_source_length: 512,
            max_target_length: 512,
            train_on_turns: TrainOnTurns::default(),
            parse_special: false,
        }
    }
}

/// Which of the assistant's turns are trained on. A turn is all that the assistant says to one
/// question, calls of tools included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOnTurns {
    /// The last one; those before it are context.
    #[default]
    Last,
    /// All. Where only what comes last can be trained on (ChatGLM-6B and ChatGLM2), every turn
    /// becomes a row of its own, behind those before it.
    All,
}

/// The form of rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Template {
    /// An instruction, perhaps with an input to it, and what to put out.
    Alpaca(Alpaca),
    /// A prompt and its response, perhaps after earlier turns.
    PromptResponse(PromptResponse),
    /// Text to be continued, for unsupervised training.
    PlainText(PlainText),
    /// A list of messages, each with `role` and `content` (OpenAI).
    Messages(Messages),
    /// A list of messages, each with `from` and `value` (ShareGPT).
    #[serde(rename = "sharegpt")]
    ShareGpt(ShareGpt),
}

impl Default for Template {
    fn default() -> Self {
        Self::Alpaca(Alpaca::default())
    }
}

/// Columns of alpaca-style rows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Alpaca {
    /// Column of the instruction.
    pub instruction: String,
    /// Column of the input; rows may lack it.
    pub input: String,
    /// Column of the answer.
    pub output: String,
}

impl Default for Alpaca {
    fn default() -> Self {
        Self {
            instruction: "instruction".to_owned(),
            input: "input".to_owned(),
            output: "output".to_owned(),
        }
    }
}

/// Columns of prompt and response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PromptResponse {
    /// Column of the prompt.
    pub prompt: String,
    /// Column of the answer.
    pub response: String,
    /// Column of earlier turns, a list of [question, answer] pairs (in CSV: as JSON text); rows may
    /// lack it. Empty: there is no such column.
    pub history: String,
    /// Whether a prompt without earlier turns is written as `[Round 0]` too, as THUDM's training
    /// code does when it is given a history column, rather than as it stands.
    pub round_for_empty_history: bool,
}

impl Default for PromptResponse {
    fn default() -> Self {
        Self {
            prompt: "prompt".to_owned(),
            response: "response".to_owned(),
            history: "history".to_owned(),
            round_for_empty_history: false,
        }
    }
}

/// Text to be continued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PlainText {
    /// Columns that may hold the text; the first that a row has counts. Plain text files need none.
    pub columns: Vec<String>,
    /// Where documents of plain text files end; a row of another file is one document.
    pub documents: Documents,
    /// Most tokens of a row, `[gMASK]`, sop and eop included.
    pub max_length: usize,
}

impl Default for PlainText {
    fn default() -> Self {
        Self {
            columns: ["content", "sentence", "text"].map(str::to_owned).to_vec(),
            documents: Documents::default(),
            max_length: 512,
        }
    }
}

/// Keys of a conversation in OpenAI's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Messages {
    /// Column of the list of messages (in CSV: as JSON text).
    pub messages: String,
    /// Key of who speaks.
    pub role: String,
    /// Key of what is said.
    pub content: String,
    /// Most tokens of a conversation, special tokens included: the oldest turns are dropped, then
    /// text is cut.
    pub max_length: usize,
}

impl Default for Messages {
    fn default() -> Self {
        Self {
            messages: "messages".to_owned(),
            role: "role".to_owned(),
            content: "content".to_owned(),
            max_length: MAX_LENGTH,
        }
    }
}

/// Keys of a conversation in ShareGPT's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShareGpt {
    /// Column of the list of messages (in CSV: as JSON text).
    pub conversations: String,
    /// Key of who speaks.
    pub from: String,
    /// Key of what is said.
    pub value: String,
    /// Column of the system message; rows may lack it. Empty: there is no such column.
    pub system: String,
    /// As [`Messages::max_length`].
    pub max_length: usize,
}

impl Default for ShareGpt {
    fn default() -> Self {
        Self {
            conversations: "conversations".to_owned(),
            from: "from".to_owned(),
            value: "value".to_owned(),
            system: "system".to_owned(),
            max_length: MAX_LENGTH,
        }
    }
}

/// Column of the tools that a conversation defines.
const TOOLS: &str = "tools";

/// Most tokens of a conversation unless told otherwise: what a pair may have.
const MAX_LENGTH: usize = 1024;

/// What a row says, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowText {
    /// Questions and their answers.
    Conversation(Conversation),
    /// A document, or a piece of one.
    Document {
        /// The text.
        text: String,
        /// Whether the document begins with it.
        begins: bool,
        /// Whether the document ends with it.
        ends: bool,
    },
}

impl RowText {
    /// Bytes of all its text.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Conversation(conversation) => conversation.bytes(),
            Self::Document { text, .. } => text.len(),
        }
    }
}

/// A setting that two templates do not share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Its name, with dots.
    pub key: String,
    /// What was saved, as JSON; `null` if nothing.
    pub saved: String,
    /// What is given, as JSON; `null` if nothing.
    pub given: String,
}

impl TemplateSettings {
    /// The settings that differ from `saved` ones.
    pub fn differences(&self, saved: &Self) -> Vec<Difference> {
        let mut differences = Vec::new();
        // Plain structs of text and numbers always have a JSON form.
        let json = |settings: &Self| serde_json::to_value(settings).unwrap_or_default();
        compare("", &json(saved), &json(self), &mut differences);
        differences
    }
}

fn compare(
    key: &str,
    saved: &serde_json::Value,
    given: &serde_json::Value,
    differences: &mut Vec<Difference>,
) {
    use serde_json::Value::{Null, Object};
    match (saved, given) {
        (Object(saved), Object(given)) => {
            let added = given.keys().filter(|name| !saved.contains_key(*name));
            for name in saved.keys().chain(added) {
                let dot = if key.is_empty() { "" } else { "." };
                let value = |map: &serde_json::Map<_, _>| map.get(name).cloned().unwrap_or(Null);
                let key = format!("{key}{dot}{name}");
                compare(&key, &value(saved), &value(given), differences);
            }
        }
        _ if saved != given => differences.push(Difference {
            key: key.to_owned(),
            saved: saved.to_string(),
            given: given.to_string(),
        }),
        _ => {}
    }
}

impl Template {
    /// The columns that a row must have: all of them, but of [`Template::PlainText`] one.
    pub fn columns(&self) -> Vec<&str> {
        match self {
            Self::Alpaca(columns) => vec![&columns.instruction, &columns.output],
            Self::PromptResponse(columns) => vec![&columns.prompt, &columns.response],
            Self::PlainText(text) => text.columns.iter().map(String::as_str).collect(),
            Self::Messages(keys) => vec![&keys.messages],
            Self::ShareGpt(keys) => vec![&keys.conversations],
        }
    }

    /// The columns that a row may have beside those that it must.
    pub fn optional_columns(&self) -> Vec<&str> {
        match self {
            Self::Alpaca(columns) => vec![&columns.input],
            Self::PromptResponse(columns) => vec![&columns.history],
            Self::PlainText(_) => Vec::new(),
            Self::Messages(_) => vec![TOOLS],
            Self::ShareGpt(keys) => vec![&keys.system, TOOLS],
        }
    }

    /// Most tokens of a conversation; `None` where prompt and answer have a limit each.
    pub fn max_length(&self) -> Option<usize> {
        match self {
            Self::Messages(keys) => Some(keys.max_length),
            Self::ShareGpt(keys) => Some(keys.max_length),
            Self::Alpaca(_) | Self::PromptResponse(_) | Self::PlainText(_) => None,
        }
    }

    /// Whether ChatGLM-6B's first question is written as a round too.
    pub fn round_for_empty_history(&self) -> bool {
        matches!(self, Self::PromptResponse(pair) if pair.round_for_empty_history)
    }

    /// The template, as the configuration names it, that reads rows with columns like these as they
    /// are.
    pub fn of_columns(found: impl Fn(&str) -> bool) -> Option<&'static str> {
        let all = |columns: &[&str]| columns.iter().all(|name| found(name));
        Some(match () {
            () if found("messages") => "messages",
            () if found("conversations") => "sharegpt",
            () if all(&["instruction", "output"]) => "alpaca",
            () if all(&["prompt", "response"]) => "prompt_response",
            () => return None,
        })
    }

    /// Where documents of plain text files end, if the template can read them.
    pub fn plain_text(&self) -> Option<Documents> {
        match self {
            Self::PlainText(text) => Some(text.documents),
            _ => None,
        }
    }

    /// Of the columns that a row must have those that `found` lacks; `None` if it will do.
    pub fn missing<'a>(&self, found: impl Fn(&str) -> bool + 'a) -> Option<Names> {
        let wanted = self.columns();
        let lacking = wanted.iter().filter(|name| !found(name));
        let missing: Vec<_> = lacking.collect();
        let will_do = match self {
            Self::PlainText(_) => missing.len() < wanted.len(),
            _ => missing.is_empty(),
        };
        (!will_do).then(|| missing.into_iter().collect())
    }

    /// What a record says.
    ///
    /// # Errors
    /// When it lacks a column, or has a list where text belongs, no prompt or no answer.
    pub fn apply(&self, content: Content) -> Result<RowText, TextProblem> {
        let columns = match content {
            Content::Text { text, begins, ends } => {
                return Ok(RowText::Document { text, begins, ends });
            }
            Content::Columns(columns) => columns,
        };
        if let Some(wanted) = self.missing(|name| columns.get(name).is_some()) {
            return Err(TextProblem::NoColumn {
                wanted,
                found: columns.names().collect(),
                template: Self::of_columns(|name| columns.get(name).is_some()),
            });
        }
        Ok(RowText::Conversation(match self {
            Self::Alpaca(alpaca) => alpaca.apply(&columns)?,
            Self::PromptResponse(pair) => pair.apply(&columns)?,
            Self::Messages(keys) => keys.apply(&columns)?,
            Self::ShareGpt(keys) => keys.apply(&columns)?,
            Self::PlainText(plain) => {
                let has = |name: &&String| columns.get(name).is_some();
                let name = plain.columns.iter().find(has);
                return Ok(RowText::Document {
                    text: filled(&columns, name.map_or("", String::as_str))?,
                    begins: true,
                    ends: true,
                });
            }
        }))
    }
}

impl Alpaca {
    fn apply(&self, columns: &Columns) -> Result<Conversation, TextProblem> {
        let input = text(columns, &self.input)?;
        let instruction = match input.as_str() {
            "" => filled(columns, &self.instruction)?,
            _ => text(columns, &self.instruction)?,
        };
        let answer = filled(columns, &self.output)?;
        Ok(Conversation::pair(
            alpaca_prompt(&instruction, &input),
            answer,
        ))
    }
}

impl PromptResponse {
    /// Past turns may lack a question or an answer, as in THUDM's data; an answer that is lacking
    /// teaches nothing.
    fn apply(&self, columns: &Columns) -> Result<Conversation, TextProblem> {
        let query = filled(columns, &self.prompt)?;
        let mut messages = Vec::new();
        for Turn { query, answer } in self.turns(columns)? {
            messages.push(Message::new(ChatRole::User, query));
            messages.push(Message {
                trained: !answer.is_empty(),
                ..Message::new(ChatRole::Assistant, answer)
            });
        }
        let last = Conversation::pair(query, filled(columns, &self.response)?);
        messages.extend(last.messages);
        Ok(Conversation {
            messages,
            ..Conversation::default()
        })
    }

    fn turns(&self, columns: &Columns) -> Result<Vec<Turn>, TextProblem> {
        let json = match columns.get(&self.history) {
            Some(Field::Nested(json)) => json,
            Some(Field::Text(json)) if !json.trim().is_empty() => json,
            _ => return Ok(Vec::new()),
        };
        let turns = history_turns(json).map_err(|message| TextProblem::History {
            column: self.history.clone(),
            message,
        })?;
        let turn = |(query, answer)| Turn { query, answer };
        Ok(turns.into_iter().map(turn).collect())
    }
}

/// The text of a column; empty if it is null or absent.
fn text(columns: &Columns, name: &str) -> Result<String, TextProblem> {
    match columns.get(name) {
        None | Some(Field::Null) => Ok(String::new()),
        Some(Field::Text(text)) => Ok(text.clone()),
        Some(Field::Nested(json)) => Err(TextProblem::NotText {
            column: name.to_owned(),
            found: match json.starts_with('[') {
                true => "a list",
                false => "an object",
            },
        }),
    }
}

/// The text of a column that must not be empty.
fn filled(columns: &Columns, name: &str) -> Result<String, TextProblem> {
    let text = text(columns, name)?;
    if text.is_empty() {
        return Err(TextProblem::Empty {
            column: name.to_owned(),
        });
    }
    Ok(text)
}
