//! The columns of a row: from JSON text, from a table, and past turns out of one of them.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::data::text_error::shortened;

/// More columns than any row has; it keeps the search for repeated names short.
const MAX_COLUMNS: usize = 1024;

/// What a column of a row holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// Nothing.
    Null,
    /// Text; of a number, `true` or `false` its JSON text.
    Text(String),
    /// The JSON text of a list or an object.
    Nested(String),
}

/// The columns of a row, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    columns: Vec<(String, Field)>,
    repeated: Option<String>,
}

impl Columns {
    /// The column of this name.
    pub fn get(&self, name: &str) -> Option<&Field> {
        let found = self.columns.iter().find(|(other, _)| other == name);
        found.map(|(_, field)| field)
    }

    /// The names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(|(name, _)| name.as_str())
    }

    /// A name that occurs more than once; its last value counts, as in Python.
    pub fn repeated(&self) -> Option<&str> {
        self.repeated.as_deref()
    }

    /// Adds a column; one of the same name is replaced.
    pub(super) fn set(&mut self, name: String, field: Field) {
        match self.columns.iter_mut().find(|(other, _)| *other == name) {
            Some((_, old)) => {
                *old = field;
                self.repeated.get_or_insert(name);
            }
            None => self.columns.push((name, field)),
        }
    }
}

impl<'de> Deserialize<'de> for Columns {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ColumnsVisitor)
    }
}

struct ColumnsVisitor;

impl<'de> Visitor<'de> for ColumnsVisitor {
    type Value = Columns;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with columns")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Columns, A::Error> {
        let mut columns = Columns::default();
        while let Some(name) = map.next_key::<String>()? {
            let raw: &RawValue = map.next_value()?;
            let field = field(raw.get()).map_err(|error| {
                let (message, ..) = parser_error(&error);
                A::Error::custom(format_args!("column `{}`: {message}", shortened(&name, 40)))
            })?;
            columns.set(name, field);
            if columns.columns.len() > MAX_COLUMNS {
                return Err(A::Error::custom(format_args!(
                    "more than {MAX_COLUMNS} columns"
                )));
            }
        }
        Ok(columns)
    }
}

fn field(json: &str) -> Result<Field, serde_json::Error> {
    Ok(match json.as_bytes().first() {
        Some(b'"') => Field::Text(serde_json::from_str(json)?),
        Some(b'n') => Field::Null,
        Some(b'[' | b'{') => Field::Nested(json.to_owned()),
        _ => Field::Text(json.to_owned()),
    })
}

/// The pairs of question and answer in a JSON list of lists of two; nothing counts as empty text.
///
/// # Errors
/// What is wrong with the list.
pub fn history_turns(json: &str) -> Result<Vec<(String, String)>, String> {
    let message = |error: serde_json::Error| shortened(&parser_error(&error).0, 120);
    let turns: Vec<(&RawValue, &RawValue)> = serde_json::from_str(json).map_err(message)?;
    let text = |json: &RawValue| match field(json.get()).map_err(message)? {
        Field::Null => Ok(String::new()),
        Field::Text(text) => Ok(text),
        Field::Nested(_) => Err("a turn holds a list or an object, expected text".to_owned()),
    };
    let turns = turns.into_iter().map(|(q, a)| Ok((text(q)?, text(a)?)));
    turns.collect()
}

/// What the parser said, without its place; line and column, from 1.
pub(in crate::data) fn parser_error(error: &serde_json::Error) -> (String, usize, usize) {
    let (line, column) = (error.line(), error.column());
    let message = error.to_string();
    let place = format!(" at line {line} column {column}");
    let message = message.strip_suffix(&place).unwrap_or(&message).to_owned();
    (message, line, column)
}
