//! What can be wrong with files of text: as a whole, and row by row.

use std::fmt::{self, Write};

use super::tokenizer::{ChatRole, ConversationProblem};

/// Why a file, a folder or a pattern cannot be used, or cannot be read any further.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileProblem {
    /// Nothing of this name.
    #[error("no such file or folder")]
    Missing,
    /// A pattern that is none.
    #[error("not a usable file pattern: {message}")]
    Pattern {
        /// What is wrong with it.
        message: String,
    },
    /// A pattern without a file.
    #[error("no file matches this pattern")]
    NoMatch,
    /// A folder without data.
    #[error(
        "no data file in this folder; looked for names that end in .{}, each also with .gz, or in \
         .parquet",
        .endings.join(", .")
    )]
    EmptyFolder {
        /// The endings that were looked for.
        endings: Vec<&'static str>,
    },
    /// A device, a pipe, a socket.
    #[error("neither a file nor a folder; save the data to a file first")]
    NotAFile,
    /// Two bytes per character.
    #[error("UTF-16 text; save the file as UTF-8")]
    Utf16,
    /// Named `.gz`, but it is something else.
    #[error("named .gz, but not gzip data; rename the file or fetch it again")]
    NotGzip,
    /// Named `.parquet`, but it is something else.
    #[error(
        "named .parquet, but not Parquet as it is written (which is not compressed as a whole); \
         rename the file or fetch it again"
    )]
    NotParquet,
    /// Parquet under another name.
    #[error("a Parquet file by its contents; name it .parquet")]
    NamedOtherwise,
    /// Parquet that cannot be read, or not any further.
    #[error("Parquet: {message}")]
    Parquet {
        /// What is wrong with it.
        message: String,
    },
    /// Compressed data that is damaged or cut off.
    #[error("damaged or incomplete gzip data ({message}); fetch the file again")]
    Gzip {
        /// What the decompressor said.
        message: String,
    },
    /// Neither name nor contents tell what it is.
    #[error(
        "neither JSON nor CSV with a column named {columns}; name the file .json, .jsonl, .csv, \
         .tsv or .parquet, or use the plain text template for text"
    )]
    UnknownFormat {
        /// The columns that the template needs.
        columns: Names,
    },
    /// A table without what the template needs.
    #[error(
        "no column {wanted}; the columns are {found}: {}",
        other_template(*.template)
    )]
    Columns {
        /// What the template looks for.
        wanted: Names,
        /// What there is.
        found: Names,
        /// The template that reads such rows, if one does.
        template: Option<&'static str>,
    },
    /// A table whose first line cannot be its header.
    #[error("the header cannot be read: {message}")]
    Header {
        /// What is wrong with it.
        message: String,
    },
    /// JSON that cannot be followed any further.
    #[error("{message} (column {column})")]
    Json {
        /// What is wrong.
        message: String,
        /// Column, from 1.
        column: usize,
    },
    /// A cut-off array.
    #[error("the file ends inside {inside}; is it complete?")]
    Unclosed {
        /// What is not closed.
        inside: &'static str,
    },
    /// A quoted field without end.
    #[error("the quote opened here is never closed; double every quote within quoted text")]
    OpenQuote,
    /// A row that never ends.
    #[error("the row beginning here goes on for more than {bytes} bytes; is this a data file?")]
    Endless {
        /// How far it was followed.
        bytes: usize,
    },
    /// Nothing in it.
    #[error("no rows")]
    NoRows,
}

/// Why the template cannot use one row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TextProblem {
    /// Valid JSON, but no row.
    #[error("a row must be an object with columns, found {found}")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// A column that the template needs.
    #[error(
        "no column {wanted}; the columns are {found}: {}",
        other_template(*.template)
    )]
    NoColumn {
        /// What the template looks for.
        wanted: Names,
        /// What there is.
        found: Names,
        /// The template that reads such rows, if one does.
        template: Option<&'static str>,
    },
    /// A list or an object where text belongs.
    #[error("column `{column}` holds {found}, expected text")]
    NotText {
        /// The column.
        column: String,
        /// What it holds.
        found: &'static str,
    },
    /// Bytes that are no text.
    #[error("column `{column}` is not UTF-8; save the file as UTF-8")]
    NotUtf8 {
        /// The column.
        column: String,
    },
    /// Nothing to ask or to answer.
    #[error("column `{column}` is empty")]
    Empty {
        /// The column.
        column: String,
    },
    /// Past turns that are none.
    #[error("column `{column}` is no list of [question, answer] pairs: {message}")]
    History {
        /// The column.
        column: String,
        /// What is wrong with it.
        message: String,
    },
    /// A column of messages that holds none.
    #[error("column `{column}` is no list of messages: {message}")]
    NoMessages {
        /// The column.
        column: String,
        /// What is wrong with it.
        message: String,
    },
    /// A message that cannot be used.
    #[error("column `{column}`, message {number}: {problem}")]
    Message {
        /// The column.
        column: String,
        /// The message, from 1.
        number: usize,
        /// What is wrong with it.
        problem: MessageProblem,
    },
    /// A conversation that the model's generation has no form for.
    #[error(transparent)]
    Conversation(#[from] ConversationProblem),
    /// Text that the tokenizer has no form for.
    #[error("{message}")]
    Tokenizer {
        /// What it said.
        message: String,
    },
    /// A conversation without a turn to train on.
    #[error(
        "nothing to learn: no answer that is trained on (train_on_turns) has a `weight` other than 0"
    )]
    NotTrained,
    /// A turn that leaves no room for what is asked and answered.
    #[error(
        "the system message and the calls of tools alone have {tokens} tokens; with {limit} \
         ({setting}) there is no room for a question and its answer"
    )]
    NoRoom {
        /// Tokens that cannot be cut.
        tokens: usize,
        /// Most that there may be.
        limit: usize,
        /// The setting that says so.
        setting: &'static str,
    },
    /// A line of a table that does not fit its header.
    #[error(
        "{found} fields, but the header has {expected}; text that holds the delimiter must stand \
         in quotes"
    )]
    Fields {
        /// Fields of the row.
        found: usize,
        /// Fields of the header.
        expected: usize,
    },
    /// More than is read of one row.
    #[error("the row is longer than {limit} bytes (max_row_bytes); split it")]
    TooLong {
        /// Longest row that is read, in bytes.
        limit: usize,
    },
}

/// What is wrong with one message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageProblem {
    /// Valid JSON, but no message.
    #[error("a message must be an object, found {found}")]
    NotAnObject {
        /// What it is.
        found: &'static str,
    },
    /// A key that a message must have.
    #[error("no key `{key}`; the keys are {found}: {}", other_keys(.found))]
    NoKey {
        /// What the template looks for.
        key: String,
        /// What there is.
        found: Names,
    },
    /// A list or an object where text belongs.
    #[error("`{key}` holds {found}, expected text")]
    NotText {
        /// The key.
        key: String,
        /// What it holds.
        found: &'static str,
    },
    /// Nobody known.
    #[error("unknown role {role}; known are {known}")]
    UnknownRole {
        /// What it says.
        role: Names,
        /// What it may say.
        known: Names,
    },
    /// Nothing is said.
    #[error("`{key}` is empty")]
    Empty {
        /// The key.
        key: String,
    },
    /// An image, a sound.
    #[error("it has a part of type {kind}; only text can be trained on")]
    Part {
        /// The part's type.
        kind: Names,
    },
    /// A weight that says neither yes nor no.
    #[error("`weight` is {found}; it may be 0 (no loss on this message) or 1")]
    Weight {
        /// What it says.
        found: String,
    },
    /// A call of a tool that cannot be read.
    #[error("a call of a tool must be an object with a `name` and `arguments`")]
    ToolCall,
    /// Somebody speaks out of turn.
    #[error(
        "it is the {found}'s where the {due}'s is due; questions and answers must take turns, and a \
         system message comes first"
    )]
    Turn {
        /// Whose it is.
        found: ChatRole,
        /// Whose is due.
        due: &'static str,
    },
    /// Nothing is answered.
    #[error("it is the last one, and the assistant has said nothing: there is nothing to learn")]
    NoAnswer,
}

/// What to do about columns that the template does not know.
fn other_template(template: Option<&str>) -> String {
    match template {
        Some(name) => format!("rows like these are read with template = \"{name}\""),
        None => "set the template's column names accordingly".to_owned(),
    }
}

/// What to do about keys of a message that the template does not know.
fn other_keys(found: &Names) -> &'static str {
    let has = |key: &str| found.0.iter().any(|name| name == key);
    if has("role") && has("content") {
        "messages like this are read with template = \"messages\""
    } else if has("from") && has("value") {
        "messages like this are read with template = \"sharegpt\""
    } else {
        "set role_key and content_key accordingly"
    }
}

/// Column names as a message shows them: the first twenty, each shortened, nothing unprintable.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names(Vec<String>);

const SHOWN_NAMES: usize = 20;
const SHOWN_CHARS: usize = 40;

impl<Name: AsRef<str>> FromIterator<Name> for Names {
    fn from_iter<I: IntoIterator<Item = Name>>(names: I) -> Self {
        let shown = names.into_iter().take(SHOWN_NAMES + 1);
        Self(
            shown
                .map(|name| shortened(name.as_ref(), SHOWN_CHARS))
                .collect(),
        )
    }
}

impl fmt::Display for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("(none)");
        }
        for (index, name) in self.0.iter().enumerate() {
            match index {
                0 => {}
                SHOWN_NAMES => return f.write_str(", .."),
                _ => f.write_str(", ")?,
            }
            write!(f, "`{name}`")?;
        }
        Ok(())
    }
}

/// At most `chars` characters of a text that a file brought, safe to print.
pub(super) fn shortened(text: &str, chars: usize) -> String {
    let mut shown = String::new();
    for (index, c) in text.chars().enumerate() {
        if index == chars {
            shown.push_str("..");
            break;
        }
        match c {
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// The examples of a message about many rows, each on a line of its own.
pub(super) fn skipped_examples(examples: &[String]) -> String {
    let mut lines = String::new();
    for example in examples {
        // Writing to a String cannot fail.
        let _ = write!(lines, "\n  {example}");
    }
    lines
}
