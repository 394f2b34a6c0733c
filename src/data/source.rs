//! Finding and opening files of text: one file, many, a folder, a pattern.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::{DataError, FileProblem};

mod open;

pub(super) use open::{Input, OpenFile, gzip_problem};

/// What the name of a file says of its contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedKind {
    /// An array of objects, or one object per line: the contents tell.
    Json,
    /// A table with a header.
    Csv {
        /// What stands between two fields.
        delimiter: u8,
    },
    /// A table by columns.
    Parquet,
    /// Text as it is.
    Text,
}

const ENDINGS: [(&str, NamedKind); 7] = [
    ("json", NamedKind::Json),
    ("jsonl", NamedKind::Json),
    ("ndjson", NamedKind::Json),
    ("csv", NamedKind::Csv { delimiter: b',' }),
    ("tsv", NamedKind::Csv { delimiter: b'\t' }),
    ("parquet", NamedKind::Parquet),
    ("txt", NamedKind::Text),
];

impl NamedKind {
    /// What the ending of the name says, `.gz` aside; `None` for an unknown ending.
    pub fn of(path: &Path) -> Option<Self> {
        let stem;
        let path = if is_named_gzip(path) {
            stem = path.with_extension("");
            &stem
        } else {
            path
        };
        let ending = path.extension()?.to_str()?;
        let known = |(name, _): &&(&str, _)| ending.eq_ignore_ascii_case(name);
        ENDINGS.iter().find(known).map(|&(_, kind)| kind)
    }
}

/// Whether the name ends in `.gz`.
fn is_named_gzip(path: &Path) -> bool {
    path.extension()
        .and_then(OsStr::to_str)
        .is_some_and(|ending| ending.eq_ignore_ascii_case("gz"))
}

/// The files that `sources` name, source by source, the files of one source sorted by path.
///
/// A source is a file, a folder (searched with all folders in it for names with a known ending;
/// hidden ones and links to folders are passed
/// over) or a pattern with `*`, `?`, `[..]` or `**`. A
/// file that two sources name is read twice. In folders, `.txt` files count only with `plain_text`,
/// for a template that can read them.
///
/// # Errors
/// A source that does not exist, cannot be read, or brings no file.
pub fn find_files(sources: &[PathBuf], plain_text: bool) -> Result<Vec<PathBuf>, DataError> {
    let mut files = Vec::new();
    for source in sources {
        let mut found = match std::fs::metadata(source) {
            Ok(metadata) if metadata.is_dir() => in_folder(source, plain_text)?,
            Ok(metadata) if metadata.is_file() => vec![source.clone()],
            Ok(_) => return Err(problem(source, FileProblem::NotAFile)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => matching(source)?,
            Err(error) => return Err(io(source, error)),
        };
        found.sort_unstable();
        files.append(&mut found);
    }
    Ok(files)
}

fn in_folder(folder: &Path, plain_text: bool) -> Result<Vec<PathBuf>, DataError> {
    let wanted = |kind| plain_text || kind != NamedKind::Text;
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).map_err(|error| io(&folder, error))? {
            let entry = entry.map_err(|error| io(&folder, error))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            // The entry's own type does not follow links, so that no circle of links is walked.
            let kind = entry.file_type().map_err(|error| io(&path, error))?;
            if kind.is_dir() {
                folders.push(path);
            } else if path.is_file() && NamedKind::of(&path).is_some_and(wanted) {
                files.push(path);
            }
        }
    }
    if files.is_empty() {
        let packed = |kind| wanted(kind) && kind != NamedKind::Parquet;
        let looked_for = ENDINGS.iter().filter(|&&(_, kind)| packed(kind));
        let endings = looked_for.map(|&(ending, _)| ending).collect();
        return Err(problem(folder, FileProblem::EmptyFolder { endings }));
    }
    Ok(files)
}

fn matching(pattern: &Path) -> Result<Vec<PathBuf>, DataError> {
    let Some(text) = pattern
        .to_str()
        .filter(|text| text.contains(['*', '?', '[']))
    else {
        return Err(problem(pattern, FileProblem::Missing));
    };
    // As in a shell: hidden files must be asked for.
    let options = glob::MatchOptions {
        require_literal_leading_dot: true,
        ..glob::MatchOptions::default()
    };
    let matches = glob::glob_with(text, options).map_err(|error| {
        let message = error.msg.to_owned();
        problem(pattern, FileProblem::Pattern { message })
    })?;
    let mut files = Vec::new();
    for found in matches {
        let path = found.map_err(|error| {
            let path = error.path().to_owned();
            io(&path, error.into())
        })?;
        if path.is_file() {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(problem(pattern, FileProblem::NoMatch));
    }
    Ok(files)
}

fn problem(path: &Path, problem: FileProblem) -> DataError {
    DataError::File {
        path: path.to_owned(),
        problem,
    }
}

fn io(path: &Path, source: std::io::Error) -> DataError {
    DataError::Io {
        path: path.to_owned(),
        source,
    }
}
