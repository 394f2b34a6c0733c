//! Questions, and how they stand in rows of JSON.

use serde_json::{Map, Value};

use crate::data::template::{Template, TemplateSettings, Turn};

/// Something to answer, as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// A question, perhaps after earlier turns.
    Text {
        /// What is asked.
        query: String,
        /// What was said before.
        history: Vec<Turn>,
    },
    /// An instruction, perhaps with an input to it.
    Instruction {
        /// What is to be done.
        instruction: String,
        /// With what; often empty.
        input: String,
    },
}

impl From<&str> for Question {
    fn from(query: &str) -> Self {
        Question::Text {
            query: query.to_owned(),
            history: Vec::new(),
        }
    }
}

/// A row that asks nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the prompts: {problem}")]
pub struct RowError {
    /// Its line, from 1.
    pub line: usize,
    /// What is wrong with it.
    pub problem: QuestionProblem,
}

/// What is wrong with a row of text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuestionProblem {
    /// None of the columns that ask something.
    #[error(
        "no column {wanted} (nor input_ids); the columns are {found}",
        wanted = .wanted.join(", "),
        found = if .found.is_empty() { "(none)".to_owned() } else { .found.join(", ") }
    )]
    NoColumn {
        /// What would ask something.
        wanted: Vec<String>,
        /// What there is.
        found: Vec<String>,
    },
    /// A list or an object where text belongs.
    #[error("column {column} holds {found}, expected text")]
    NotText {
        /// The column.
        column: String,
        /// What it holds.
        found: &'static str,
    },
    /// Nothing is asked.
    #[error("column {column} is empty")]
    Empty {
        /// The column.
        column: String,
    },
    /// Earlier turns that are none.
    #[error("column {column} is no list of [question, answer] pairs")]
    History {
        /// The column.
        column: String,
    },
    /// Text for a model without a tokenizer.
    #[error(
        "text, but {folder} has no tokenizer: put the model's tokenizer files (ice_text.model, \
         tokenizer.model or tokenizer.json, and tokenizer_config.json) there, or give input_ids"
    )]
    NoTokenizer {
        /// The model's folder.
        folder: String,
    },
}

/// Most names of columns in a message.
const SHOWN_COLUMNS: usize = 20;

impl Question {
    /// The question of a row: by the columns of the template, or by the usual `instruction`, `input`
    /// and `prompt`, `history`. Other columns are not looked at, so that rows of a training or
    /// evaluation set will do.
    ///
    /// # Errors
    /// What is wrong with the row.
    pub fn from_row(
        row: &Map<String, Value>,
        settings: &TemplateSettings,
    ) -> Result<Self, QuestionProblem> {
        let mut wanted = Vec::new();
        let usual = [
            Template::Alpaca(Default::default()),
            Template::PromptResponse(Default::default()),
        ];
        for template in std::iter::once(&settings.template).chain(&usual) {
            let asking: Vec<&String> = match template {
                Template::Alpaca(alpaca) => vec![&alpaca.instruction],
                Template::PromptResponse(pair) => vec![&pair.prompt],
                Template::PlainText(plain) => plain.columns.iter().collect(),
                // Their rows hold the answers too; questions are asked by the usual columns.
                Template::Messages(_) | Template::ShareGpt(_) => Vec::new(),
            };
            if let Some(column) = asking.iter().find(|name| row.contains_key(name.as_str())) {
                return match template {
                    Template::Alpaca(alpaca) => instruction(row, column, &alpaca.input),
                    Template::PromptResponse(pair) => conversation(row, column, &pair.history),
                    Template::PlainText(_) | Template::Messages(_) | Template::ShareGpt(_) => {
                        Ok(Question::Text {
                            query: filled(row, column)?,
                            history: Vec::new(),
                        })
                    }
                };
            }
            for name in asking {
                if !wanted.contains(name) {
                    wanted.push(name.clone());
                }
            }
        }
        let found = row.keys().take(SHOWN_COLUMNS).map(|name| shown(name));
        Err(QuestionProblem::NoColumn {
            wanted,
            found: found.collect(),
        })
    }
}

fn instruction(
    row: &Map<String, Value>,
    column: &str,
    input: &str,
) -> Result<Question, QuestionProblem> {
    let input = text(row, input)?;
    let instruction = match input.as_str() {
        "" => filled(row, column)?,
        _ => text(row, column)?,
    };
    Ok(Question::Instruction { instruction, input })
}

fn conversation(
    row: &Map<String, Value>,
    column: &str,
    history: &str,
) -> Result<Question, QuestionProblem> {
    Ok(Question::Text {
        query: filled(row, column)?,
        history: turns(row.get(history)).ok_or_else(|| QuestionProblem::History {
            column: shown(history),
        })?,
    })
}

/// Earlier turns; nothing counts as none, and null as empty text.
fn turns(history: Option<&Value>) -> Option<Vec<Turn>> {
    let turns = match history {
        None | Some(Value::Null) => return Some(Vec::new()),
        Some(history) => history.as_array()?,
    };
    let turn = |turn: &Value| match turn.as_array()?.as_slice() {
        [query, answer] => Some(Turn {
            query: plain_text(query)?,
            answer: plain_text(answer)?,
        }),
        _ => None,
    };
    turns.iter().map(turn).collect()
}

/// The text of a value: nothing for null, JSON for a number, true and false.
fn plain_text(value: &Value) -> Option<String> {
    match value {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        Value::Bool(_) | Value::Number(_) => Some(value.to_string()),
        Value::Array(_) | Value::Object(_) => None,
    }
}

fn text(row: &Map<String, Value>, column: &str) -> Result<String, QuestionProblem> {
    let value = row.get(column).unwrap_or(&Value::Null);
    plain_text(value).ok_or_else(|| QuestionProblem::NotText {
        column: shown(column),
        found: match value {
            Value::Array(_) => "a list",
            _ => "an object",
        },
    })
}

fn filled(row: &Map<String, Value>, column: &str) -> Result<String, QuestionProblem> {
    let text = text(row, column)?;
    match text.is_empty() {
        true => Err(QuestionProblem::Empty {
            column: shown(column),
        }),
        false => Ok(text),
    }
}

/// A column's name, safe to print.
fn shown(name: &str) -> String {
    name.chars().take(40).flat_map(char::escape_debug).collect()
}
