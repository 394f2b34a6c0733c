//! Questions and token ids in and out of `mp-train generate`, as JSONL.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::failure::Failure;
use crate::config::generate::Prompt;
use crate::data::template::TemplateSettings;
use crate::generate::question::Question;
use crate::generate::{Answer, Input};
use crate::report::atomic_file::AtomicFile;

/// Longest row that is read: a million ids and more.
const MAX_ROW_BYTES: u64 = 1 << 24;

/// A row of ids as typed.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IdRow {
    input_ids: Vec<u32>,
    context_length: Option<usize>,
    position_ids: Option<[Vec<u32>; 2]>,
}

/// Rows as they stand in the file, in order.
pub(super) type Rows = Vec<Map<String, Value>>;

/// The name of an input for messages.
pub(super) fn name(path: &Path) -> String {
    match path == Path::new("-") {
        true => "standard input".to_owned(),
        false => path.display().to_string(),
    }
}

/// Reads all prompts from a file, or from standard input when it is `-`. The error names the line.
pub(super) fn read(
    path: &Path,
    template: &TemplateSettings,
) -> Result<(Rows, Vec<Input>), Failure> {
    let name = name(path);
    if path == Path::new("-") {
        return parse(&name, io::stdin().lock(), template);
    }
    let file = File::open(path).map_err(|error| Failure::user(format!("{name}: {error}")))?;
    parse(&name, BufReader::new(file), template)
}

fn parse(
    name: &str,
    mut input: impl BufRead,
    template: &TemplateSettings,
) -> Result<(Rows, Vec<Input>), Failure> {
    let (mut rows, mut inputs) = (Vec::new(), Vec::new());
    let mut text = Vec::new();
    for line in 1.. {
        let at_line = |what: String| Failure::user(format!("{name}:{line}: {what}"));
        match read_line(&mut input, &mut text).map_err(|error| at_line(error.to_string()))? {
            0 => break,
            _ if text.trim_ascii().is_empty() => continue,
            _ => {
                let (row, input) = row(line, &text, template).map_err(at_line)?;
                rows.push(row);
                inputs.push(input);
            }
        }
    }
    if inputs.is_empty() {
        return Err(Failure::user(format!("{name}: no prompts")).hint(
            "one row per prompt: {\"prompt\": \"Hello\"} or {\"instruction\": \"Translate\", \
             \"input\": \"Hello\"} or {\"input_ids\": [5, 6, 7, 130001, 130004]}",
        ));
    }
    Ok((rows, inputs))
}

/// Reads a line in place of `line`, its end included; its length.
pub(super) fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<usize> {
    line.clear();
    let read = input.take(MAX_ROW_BYTES).read_until(b'\n', line)?;
    if read as u64 == MAX_ROW_BYTES {
        let problem = format!("a row of {MAX_ROW_BYTES} bytes or more");
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    Ok(read)
}

fn row(
    line: usize,
    text: &[u8],
    template: &TemplateSettings,
) -> Result<(Map<String, Value>, Input), String> {
    // The row is line 1 of itself; only the column means something.
    let json_problem = |error: serde_json::Error| {
        let told = error.to_string();
        told.replace(" at line 1 column ", " at column ")
    };
    let text = text
        .strip_prefix(b"\xEF\xBB\xBF")
        .filter(|_| line == 1)
        .unwrap_or(text);
    let row: Map<String, Value> = serde_json::from_slice(text).map_err(json_problem)?;
    let input = match row.contains_key("input_ids") {
        true => Input::Ids(prompt(
            line,
            serde_json::from_slice(text).map_err(json_problem)?,
        )?),
        false => {
            let question = Question::from_row(&row, template);
            let question = question.map_err(|problem| problem.to_string())?;
            Input::Text { line, question }
        }
    };
    Ok((row, input))
}

fn prompt(line: usize, row: IdRow) -> Result<Prompt, String> {
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
    let IdRow {
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

    /// Writes a row with its answer added.
    pub(super) fn write(&mut self, row: &Map<String, Value>, answer: &Answer) -> io::Result<()> {
        let mut row = row.clone();
        if let Some(text) = &answer.text {
            row.insert("answer".to_owned(), text.as_str().into());
        }
        row.insert("new_tokens".to_owned(), answer.new_tokens.as_slice().into());
        self.write_json(&row)
    }

    /// Writes a line of JSON.
    pub(super) fn write_json(&mut self, row: &impl Serialize) -> io::Result<()> {
        let mut row = serde_json::to_vec(row)?;
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

    fn read_rows(text: &[u8]) -> Result<(Rows, Vec<Input>), Failure> {
        parse("p.jsonl", text, &TemplateSettings::default())
    }

    #[test]
    fn rows_are_read_with_their_lines() {
        let text = b"\xEF\xBB\xBF{\"input_ids\": [5, 191, 194]}\r\n\n\
            {\"input_ids\": [7], \"context_length\": 1, \"position_ids\": [[0], [0]]}";
        let (rows, inputs) = read_rows(text).unwrap();
        assert_eq!(rows.len(), 2);
        let [Input::Ids(first), Input::Ids(second)] = &inputs[..] else {
            panic!("{inputs:?}");
        };
        assert_eq!((first.line, &first.input_ids[..]), (1, &[5, 191, 194][..]));
        assert_eq!((second.line, second.context_length), (3, Some(1)));
        assert_eq!(second.position_ids, Some([vec![0], vec![0]]));
    }

    #[test]
    fn text_rows_are_told_by_their_columns() {
        let question = |row: &str| match read_rows(row.as_bytes()).unwrap().1.remove(0) {
            Input::Text { question, .. } => question,
            Input::Ids(_) => panic!("{row}"),
        };
        let text = |query: &str, history: &[[&str; 2]]| Question::Text {
            query: query.to_owned(),
            history: history
                .iter()
                .map(|[query, answer]| crate::data::template::Turn {
                    query: (*query).to_owned(),
                    answer: (*answer).to_owned(),
                })
                .collect(),
        };
        let instruction = |instruction: &str, input: &str| Question::Instruction {
            instruction: instruction.to_owned(),
            input: input.to_owned(),
        };
        for (row, expected) in [
            ("{\"prompt\": \"q\", \"response\": \"r\"}", text("q", &[])),
            ("{\"prompt\": 12, \"history\": null}", text("12", &[])),
            (
                "{\"prompt\": \"q\", \"history\": [[\"a\", \"b\"], [1, null]]}",
                text("q", &[["a", "b"], ["1", ""]]),
            ),
            ("{\"instruction\": \"i\"}", instruction("i", "")),
            (
                "{\"input\": \"n\", \"instruction\": null}",
                instruction("", "n"),
            ),
        ] {
            assert_eq!(question(row), expected, "{row}");
        }
        let columns: TemplateSettings = toml::from_str(
            "[template]\nkind = \"prompt_response\"\nprompt = \"frage\"\nhistory = \"alt\"",
        )
        .unwrap();
        let row = b"{\"frage\": \"q\", \"alt\": [[\"a\", \"b\"]], \"prompt\": \"other\"}";
        let (_, inputs) = parse("p", &row[..], &columns).unwrap();
        let question = text("q", &[["a", "b"]]);
        assert_eq!(inputs, [Input::Text { line: 1, question }]);
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
            (
                "{\"input_ids\": [1], \"contxt_length\": 1}",
                "p.jsonl:1: unknown field `contxt_length`",
            ),
            (
                "{\"ids\": [1]}",
                "p.jsonl:1: no column instruction, prompt (nor input_ids); the columns are ids",
            ),
            ("{}", "the columns are (none)"),
            ("[1]", "p.jsonl:1: invalid type: sequence"),
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
            ("{\"prompt\": \"\"}", "p.jsonl:1: column prompt is empty"),
            (
                "{\"prompt\": [1]}",
                "column prompt holds a list, expected text",
            ),
            (
                "{\"instruction\": \"i\", \"input\": {}}",
                "column input holds an object",
            ),
            (
                "{\"prompt\": \"q\", \"history\": [[\"a\"]]}",
                "column history is no list of [question, answer] pairs",
            ),
            (
                "{\"prompt\": \"q\", \"history\": \"a\"}",
                "column history is no list",
            ),
        ] {
            let failure = read_rows(row.as_bytes()).unwrap_err();
            assert!(
                format!("{failure:?}").contains(message),
                "{row}: {failure:?}"
            );
            assert_eq!(failure.exit_code(), 2);
        }
        let failure = read_rows(b"{\"prompt\": \"\xff\"}").unwrap_err();
        assert!(
            format!("{failure:?}").contains("p.jsonl:1: invalid unicode"),
            "{failure:?}"
        );
    }
}
