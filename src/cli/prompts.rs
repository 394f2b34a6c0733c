//! Token ids in and out of `mp-train generate`, as JSONL.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::failure::Failure;
use crate::config::generate::Prompt;
use crate::report::atomic_file::AtomicFile;

/// Longest row that is read: a million ids and more.
const MAX_ROW_BYTES: u64 = 1 << 24;

/// A row of the input as typed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    input_ids: Vec<u32>,
    context_length: Option<usize>,
    position_ids: Option<[Vec<u32>; 2]>,
}

/// Reads all prompts from a file, or from standard input when it is `-`. The error names the line.
pub(super) fn read(path: &Path) -> Result<Vec<Prompt>, Failure> {
    if path == Path::new("-") {
        return parse("standard input", io::stdin().lock());
    }
    let name = path.display().to_string();
    let file = File::open(path).map_err(|error| Failure::user(format!("{name}: {error}")))?;
    parse(&name, BufReader::new(file))
}

fn parse(name: &str, mut input: impl BufRead) -> Result<Vec<Prompt>, Failure> {
    let mut prompts = Vec::new();
    let mut text = Vec::new();
    for line in 1.. {
        let at_line = |what: String| Failure::user(format!("{name}:{line}: {what}"));
        text.clear();
        let read = input
            .by_ref()
            .take(MAX_ROW_BYTES)
            .read_until(b'\n', &mut text);
        match read.map_err(|error| at_line(error.to_string()))? {
            0 => break,
            n if n as u64 == MAX_ROW_BYTES => {
                return Err(at_line(format!("a row of {MAX_ROW_BYTES} bytes or more")));
            }
            _ if text.trim_ascii().is_empty() => continue,
            _ => prompts.push(prompt(line, &text).map_err(at_line)?),
        }
    }
    if prompts.is_empty() {
        return Err(Failure::user(format!("{name}: no prompts"))
            .hint("one row per prompt: {\"input_ids\": [5, 6, 7, 130001, 130004]}"));
    }
    Ok(prompts)
}

fn prompt(line: usize, text: &[u8]) -> Result<Prompt, String> {
    let row: Row = serde_json::from_slice(text).map_err(|error| {
        // The row is line 1 of itself; only the column means something.
        error
            .to_string()
            .replace(" at line 1 column ", " at column ")
    })?;
    let ids = row.input_ids.len();
    if ids == 0 {
        return Err("input_ids is empty".to_owned());
    }
    if let Some(context) = row.context_length.filter(|context| *context > ids) {
        return Err(format!(
            "context_length is {context}, but there are {ids} input_ids"
        ));
    }
    if let Some(positions) = row
        .position_ids
        .iter()
        .flatten()
        .find(|row| row.len() != ids)
    {
        let found = positions.len();
        return Err(format!(
            "position_ids has a row of {found}, but there are {ids} input_ids"
        ));
    }
    let Row {
        input_ids,
        context_length,
        position_ids,
    } = row;
    Ok(Prompt {
        line,
        input_ids,
        context_length,
        position_ids,
    })
}

/// Where answers go.
pub(super) enum Answers {
    /// Standard output, a pipe or a device: row by row.
    Stream(Box<dyn Write>),
    /// A file that appears when it is complete.
    File(PathBuf, AtomicFile),
}

impl Answers {
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return Ok(Answers::Stream(Box::new(io::stdout())));
        }
        let create = || match path.metadata() {
            // Renaming over /dev/null or a named pipe would replace it by a file.
            Ok(there) if !there.is_file() => {
                let stream = File::options().write(true).open(path)?;
                Ok(Answers::Stream(Box::new(stream)))
            }
            _ => Ok(Answers::File(path.to_owned(), AtomicFile::create(path)?)),
        };
        create().map_err(|error: io::Error| cannot_write(path, &error))
    }

    pub(super) fn write(&mut self, prompt: &Prompt, new_tokens: &[u32]) -> io::Result<()> {
        #[derive(Serialize)]
        struct Answer<'a> {
            input_ids: &'a [u32],
            new_tokens: &'a [u32],
        }
        let mut row = serde_json::to_vec(&Answer {
            input_ids: &prompt.input_ids,
            new_tokens,
        })?;
        row.push(b'\n');
        match self {
            Answers::Stream(out) => {
                out.write_all(&row)?;
                out.flush()
            }
            Answers::File(_, file) => file.write_all(&row),
        }
    }

    pub(super) fn finish(self) -> Result<(), Failure> {
        match self {
            Answers::Stream(_) => Ok(()),
            Answers::File(path, file) => file.commit().map_err(|error| cannot_write(&path, &error)),
        }
    }
}

fn cannot_write(path: &Path, error: &io::Error) -> Failure {
    Failure::user(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_with_their_lines() {
        let text = b"{\"input_ids\": [5, 191, 194]}\n\n\
            {\"input_ids\": [7], \"context_length\": 1, \"position_ids\": [[0], [0]]}";
        let prompts = parse("p.jsonl", &text[..]).unwrap();
        assert_eq!(prompts.len(), 2);
        assert_eq!(
            (prompts[0].line, &prompts[0].input_ids[..]),
            (1, &[5, 191, 194][..])
        );
        assert_eq!((prompts[1].line, prompts[1].context_length), (3, Some(1)));
        assert_eq!(prompts[1].position_ids, Some([vec![0], vec![0]]));
    }

    #[test]
    fn wrong_rows_are_named() {
        for (row, message) in [
            ("", "p.jsonl: no prompts"),
            ("{\"input_ids\": []}", "p.jsonl:1: input_ids is empty"),
            (
                "\n{\"input_ids\": [1, -2]}",
                "p.jsonl:2: invalid value: integer `-2`",
            ),
            ("{\"ids\": [1]}", "p.jsonl:1: unknown field `ids`"),
            ("{\"input_ids\": [1", "p.jsonl:1: EOF"),
            (
                "{\"input_ids\": [1], \"context_length\": 2}",
                "context_length is 2, but there are 1",
            ),
            (
                "{\"input_ids\": [1], \"position_ids\": [[0], []]}",
                "a row of 0, but there are 1",
            ),
            ("\u{0}", "p.jsonl:1: expected value"),
        ] {
            let failure = parse("p.jsonl", row.as_bytes()).unwrap_err();
            assert!(
                format!("{failure:?}").contains(message),
                "{row}: {failure:?}"
            );
            assert_eq!(failure.exit_code(), 2);
        }
    }
}
