//! Rows that are lists of messages: OpenAI's `messages` and ShareGPT's `conversations`.

use serde_json::{Map, Value};

use super::conversation::{Conversation, Message};
use super::{Messages, ShareGpt, TOOLS, text};
use crate::data::TextProblem;
use crate::data::records::{Columns, Field, parser_error};
use crate::data::text_error::{MessageProblem, shortened};
use crate::data::tokenizer::ChatRole;

/// Where the parts of a message stand in its object.
struct Keys<'a> {
    column: &'a str,
    role: &'a str,
    content: &'a str,
}

/// What a role is called in data sets, and whether its content calls a tool.
const ROLES: [(&str, ChatRole, bool); 15] = [
    ("system", ChatRole::System, false),
    ("developer", ChatRole::System, false),
    ("user", ChatRole::User, false),
    ("human", ChatRole::User, false),
    ("assistant", ChatRole::Assistant, false),
    ("gpt", ChatRole::Assistant, false),
    ("chatgpt", ChatRole::Assistant, false),
    ("model", ChatRole::Assistant, false),
    ("bot", ChatRole::Assistant, false),
    ("function_call", ChatRole::Assistant, true),
    ("tool_call", ChatRole::Assistant, true),
    ("observation", ChatRole::Observation, false),
    ("tool", ChatRole::Observation, false),
    ("function", ChatRole::Observation, false),
    ("function_response", ChatRole::Observation, false),
];

impl Messages {
    pub(super) fn apply(&self, columns: &Columns) -> Result<Conversation, TextProblem> {
        let keys = Keys {
            column: &self.messages,
            role: &self.role,
            content: &self.content,
        };
        keys.conversation(columns, Vec::new())
    }
}

impl ShareGpt {
    pub(super) fn apply(&self, columns: &Columns) -> Result<Conversation, TextProblem> {
        let keys = Keys {
            column: &self.conversations,
            role: &self.from,
            content: &self.value,
        };
        let system = text(columns, &self.system)?;
        let system = (!system.is_empty()).then(|| Message::new(ChatRole::System, system));
        keys.conversation(columns, system.into_iter().collect())
    }
}

impl Keys<'_> {
    /// The conversation in a row's columns, behind messages that stand in other columns.
    fn conversation(
        &self,
        columns: &Columns,
        mut messages: Vec<Message>,
    ) -> Result<Conversation, TextProblem> {
        let before = messages.len();
        let mut numbers = vec![0; before];
        for (number, message) in (1..).zip(self.list(columns)?) {
            let read = self.read(&message, &mut messages);
            read.map_err(|problem| self.of_message(number, problem))?;
            numbers.resize(messages.len(), number);
        }
        if messages.len() == before {
            return Err(TextProblem::Empty {
                column: self.column.to_owned(),
            });
        }
        let checked = Conversation::checked(messages);
        let mut conversation = checked.map_err(|(index, problem)| {
            // One message may call several tools, and one may stand in a column of its own.
            self.of_message(numbers.get(index - 1).copied().unwrap_or(index), problem)
        })?;
        conversation.defines_tools = match columns.get(TOOLS) {
            Some(Field::Text(tools) | Field::Nested(tools)) => {
                !matches!(tools.trim(), "" | "[]" | "{}")
            }
            Some(Field::Null) | None => false,
        };
        Ok(conversation)
    }

    fn of_message(&self, number: usize, problem: MessageProblem) -> TextProblem {
        TextProblem::Message {
            column: self.column.to_owned(),
            number,
            problem,
        }
    }

    /// The elements of the column, which a table holds as JSON text.
    fn list(&self, columns: &Columns) -> Result<Vec<Value>, TextProblem> {
        let no_list = |message: String| TextProblem::NoMessages {
            column: self.column.to_owned(),
            message,
        };
        match columns.get(self.column) {
            Some(Field::Nested(json) | Field::Text(json)) if !json.trim().is_empty() => {
                serde_json::from_str(json)
                    .map_err(|error| no_list(shortened(&parser_error(&error).0, 120)))
            }
            _ => Err(TextProblem::Empty {
                column: self.column.to_owned(),
            }),
        }
    }

    /// Reads one message, which becomes several if it calls tools.
    fn read(&self, message: &Value, messages: &mut Vec<Message>) -> Result<(), MessageProblem> {
        let Value::Object(message) = message else {
            return Err(MessageProblem::NotAnObject {
                found: kind(message),
            });
        };
        let no_key = |key: &str| MessageProblem::NoKey {
            key: key.to_owned(),
            found: message.keys().collect(),
        };
        let name = match message.get(self.role).ok_or_else(|| no_key(self.role))? {
            Value::String(name) => name,
            other => return Err(self.not_text(self.role, other)),
        };
        let known = ROLES.iter().find(|(known, ..)| known == name);
        let Some(&(_, role, calls_tool)) = known else {
            return Err(MessageProblem::UnknownRole {
                role: [name].iter().collect(),
                known: ROLES.iter().map(|(known, ..)| known).collect(),
            });
        };
        let trained = match role {
            ChatRole::Assistant => weight(message)?,
            _ => true,
        };
        let calls = match message.get("tool_calls") {
            Some(Value::Array(calls)) => calls.as_slice(),
            _ => &[],
        };
        let content = match message.get(self.content) {
            Some(content) => self.content(content)?,
            None if !calls.is_empty() => String::new(),
            None => return Err(no_key(self.content)),
        };
        if calls_tool {
            let calls: Value = serde_json::from_str(&content).map_err(|_| no_call())?;
            return match &calls {
                Value::Array(calls) if !calls.is_empty() => calls.iter().try_for_each(|call| {
                    messages.push(tool_call(call, trained)?);
                    Ok(())
                }),
                call => {
                    messages.push(tool_call(call, trained)?);
                    Ok(())
                }
            };
        }
        if content.trim().is_empty() && calls.is_empty() && role != ChatRole::Observation {
            return Err(MessageProblem::Empty {
                key: self.content.to_owned(),
            });
        }
        if !content.is_empty() || calls.is_empty() {
            messages.push(Message {
                trained,
                ..Message::new(role, content)
            });
        }
        for call in calls {
            messages.push(tool_call(call.get("function").unwrap_or(call), trained)?);
        }
        Ok(())
    }

    /// The text of a message; the text parts of a list of parts, one after the other.
    fn content(&self, content: &Value) -> Result<String, MessageProblem> {
        match content {
            Value::String(text) => Ok(text.clone()),
            Value::Null => Ok(String::new()),
            Value::Number(_) | Value::Bool(_) => Ok(content.to_string()),
            Value::Array(parts) => parts.iter().map(|part| self.part(part)).collect(),
            Value::Object(_) => Err(self.not_text(self.content, content)),
        }
    }

    fn part<'a>(&self, part: &'a Value) -> Result<&'a str, MessageProblem> {
        let kind = part.get("type").and_then(Value::as_str);
        match (kind, part.get("text").and_then(Value::as_str), part) {
            (Some("text" | "input_text" | "output_text"), Some(text), _) => Ok(text),
            (_, _, Value::String(text)) => Ok(text),
            (kind, ..) => Err(MessageProblem::Part {
                kind: [kind.unwrap_or("?")].iter().collect(),
            }),
        }
    }

    fn not_text(&self, key: &str, found: &Value) -> MessageProblem {
        MessageProblem::NotText {
            key: key.to_owned(),
            found: kind(found),
        }
    }
}

/// OpenAI's `weight` of an assistant's message: whether it is trained on.
fn weight(message: &Map<String, Value>) -> Result<bool, MessageProblem> {
    match message.get("weight") {
        None | Some(Value::Null) => Ok(true),
        Some(weight) if weight.as_f64() == Some(1.0) => Ok(true),
        Some(weight) if weight.as_f64() == Some(0.0) => Ok(false),
        Some(weight) => Err(MessageProblem::Weight {
            found: shortened(&weight.to_string(), 40),
        }),
    }
}

/// A call of a tool: its name on the line of the role, its arguments as JSON.
fn tool_call(call: &Value, trained: bool) -> Result<Message, MessageProblem> {
    let name = call.get("name").and_then(Value::as_str);
    let arguments = call.get("arguments").or_else(|| call.get("parameters"));
    let (Some(name), Some(arguments)) = (name.filter(|name| !name.is_empty()), arguments) else {
        return Err(no_call());
    };
    Ok(Message {
        metadata: name.to_owned(),
        trained,
        ..Message::new(
            ChatRole::Assistant,
            match arguments {
                Value::String(json) => json.clone(),
                other => other.to_string(),
            },
        )
    })
}

fn no_call() -> MessageProblem {
    MessageProblem::ToolCall
}

/// What a JSON value is, in words.
fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
