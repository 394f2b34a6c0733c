//! One JSON array of objects, element by element.
//!
//! The reader follows brackets and strings only as far as needed to find where an element ends;
//! the parser then sees that element alone. A broken element costs no more than itself as long as
//! its brackets match, and a string ends at a line feed, which JSON allows inside none, so that a
//! forgotten quote does not turn the rest of the file inside out.

use super::json_lines::parse;
use super::{Content, Input, ReadError, Record, RowBytes};
use crate::data::{FileProblem, RowProblem};

#[derive(Default)]
pub(super) struct JsonArray {
    state: State,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum State {
    /// Before the opening bracket.
    #[default]
    Start,
    /// Behind the opening bracket.
    First,
    /// Behind an element.
    Between,
}

impl JsonArray {
    pub(super) fn next(
        &mut self,
        input: &mut Input,
        limit: usize,
    ) -> Result<Option<Record>, ReadError> {
        if self.state == State::Start {
            // The format was told by the bracket.
            input.skip_white_space()?;
            input.next_byte()?;
            self.state = State::First;
        }
        let mut next = input.skip_white_space()?;
        match (self.state, next) {
            (_, Some(b']')) => {
                input.next_byte()?;
                return match input.skip_white_space()? {
                    None => Ok(None),
                    Some(_) => Err(broken(input, "more text behind the end of the array")),
                };
            }
            (State::Between, Some(b',')) => {
                input.next_byte()?;
                next = input.skip_white_space()?;
            }
            (State::Between, Some(_)) => {
                return Err(broken(input, "expected `,` or `]` behind a row"));
            }
            _ => {}
        }
        match next {
            None => {
                return Err(ReadError::Broken {
                    line: input.line(),
                    problem: FileProblem::Unclosed {
                        inside: "the array of rows",
                    },
                });
            }
            Some(b',' | b']') => return Err(broken(input, "expected a row")),
            Some(_) => self.state = State::Between,
        }
        let (line, column) = (input.line(), input.column());
        let mut row = RowBytes::new(line, limit);
        let complete = read_value(input, &mut row)?;
        let columns = parse(&row.kept, line, column);
        // Where its end was not found, a mistake within what was read explains why.
        if !complete {
            return Err(unclosed(line, columns.err()));
        }
        if row.is_too_long() {
            return Err(row.too_long());
        }
        Ok(Some(Record {
            line,
            content: Content::Columns(columns?),
        }))
    }
}

/// Reads one value; whether its end was found. An object does not end with the bracket that ends the
/// array: then one of its own is missing, and nothing behind it can be told apart.
fn read_value(input: &mut Input, row: &mut RowBytes) -> Result<bool, ReadError> {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    while let Some(byte) = input.peek()? {
        let at_end = byte == b',' || byte == b']' || byte.is_ascii_whitespace();
        if depth == 0 && !in_string && row.seen > 0 && at_end {
            return Ok(true);
        }
        input.advance(byte);
        row.push(byte)?;
        if in_string {
            in_string = byte != b'\n' && (byte != b'"' || escaped);
            escaped = byte == b'\\' && !escaped;
            continue;
        }
        match byte {
            b'"' => (in_string, escaped) = (true, false),
            b'{' | b'[' => depth += 1,
            b'}' | b']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    let opening = if byte == b']' { b'[' } else { b'{' };
                    return Ok(row.kept.first() == Some(&opening));
                }
            }
            _ => {}
        }
    }
    Ok(false)
}

/// The error for a row that the file ends in: the mistake that hid its end, if there is one.
fn unclosed(line: usize, error: Option<ReadError>) -> ReadError {
    match error {
        Some(ReadError::Row {
            line,
            problem: RowProblem::Json { message, column },
        }) if !message.starts_with("EOF") => ReadError::Broken {
            line,
            problem: FileProblem::Json { message, column },
        },
        _ => ReadError::Broken {
            line,
            problem: FileProblem::Unclosed {
                inside: "the row that begins here",
            },
        },
    }
}

fn broken(input: &Input, message: &str) -> ReadError {
    ReadError::Broken {
        line: input.line(),
        problem: FileProblem::Json {
            message: message.to_owned(),
            column: input.column(),
        },
    }
}
