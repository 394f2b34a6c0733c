//! Rows of text out of files: found, read, put into the template's form, bad ones set aside.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize, Serializer};

use super::records::{Record, Records, Wanted};
use super::source::find_files;
use super::template::{RowText, Template, TemplateSettings};
use super::{DataError, FileProblem};

mod bad_rows;
mod conversations;
mod encode;
mod lengths;

pub use bad_rows::{BadRowLog, BadRows};
pub use encode::{Cuts, EncodeError, Encoded, RowEncoder};

/// Longest row that is read unless told otherwise, in bytes: far more than a model takes.
pub const MAX_ROW_BYTES: usize = 16 << 20;

/// How rows of text are read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TextSettings {
    /// What they become.
    pub template: TemplateSettings,
    /// What happens to those that cannot be used.
    pub bad_rows: BadRows,
    /// Longest row that is read, in bytes; a longer one is a bad row.
    pub max_row_bytes: usize,
}

impl Default for TextSettings {
    fn default() -> Self {
        Self {
            template: TemplateSettings::default(),
            bad_rows: BadRows::default(),
            max_row_bytes: MAX_ROW_BYTES,
        }
    }
}

/// A row, with where it comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextRow {
    /// What it says.
    pub text: RowText,
    /// The file.
    pub file: Arc<Path>,
    /// Line on which it begins, from 1.
    pub line: usize,
}

/// What was noticed while rows were read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowReport {
    /// Rows given out.
    pub rows: usize,
    /// Rows that were set aside.
    pub bad: BadRowLog,
    /// Rows that name a column twice; the last value counts.
    pub repeated_columns: usize,
    /// The first of them: file, line, column.
    pub first_repeated: Option<String>,
    /// Files without any row, where others have some.
    #[serde(serialize_with = "lossy_paths")]
    pub empty_files: Vec<PathBuf>,
    /// What did not fit. It is known once the rows are token ids.
    pub cuts: Cuts,
    /// Conversations with messages behind the last answer, which were left out.
    pub unanswered: usize,
    /// Conversations that define tools, which the model is not shown.
    pub undefined_tools: usize,
}

/// JSON is text, paths need not be: what is none is shown as well as it can be.
fn lossy_paths<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

impl RowReport {
    /// What the user should know, a sentence each.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = Vec::new();
        if self.bad.count() > 0 {
            let examples = self.bad.examples().join("; ");
            let count = self.bad.count();
            notices.push(format!("{count} rows are left out, such as: {examples}"));
        }
        if let Some(first) = &self.first_repeated {
            let rows = self.repeated_columns;
            notices.push(format!(
                "{rows} rows name a column twice, the first is {first}; the last value counts"
            ));
        }
        notices.extend(self.cuts.notices());
        let counted = [
            (
                self.unanswered,
                "conversations end with messages that nobody answers; these are left out",
            ),
            (
                self.undefined_tools,
                "conversations have a column `tools`; the model is not shown it: put what it is to \
                 know of its tools into the system message",
            ),
        ];
        let counted = counted.iter().filter(|(count, _)| *count > 0);
        notices.extend(counted.map(|(count, what)| format!("{count} {what}")));
        let empty = self.empty_files.iter();
        notices.extend(empty.map(|path| format!("{}: holds no row", path.display())));
        notices
    }
}

/// The rows of all files, in order; one file is open at a time, and one row of it in memory.
///
/// Under [`BadRows::Skip`] bad rows are only counted. An error ends the rows: under
/// [`BadRows::Fatal`] the first bad row, else what makes a file unusable, or that no row can be used
/// at all.
pub struct TextRows {
    settings: TextSettings,
    files: std::vec::IntoIter<PathBuf>,
    bytes: u64,
    bytes_read: Arc<AtomicU64>,
    current: Option<Current>,
    report: RowReport,
    ended: bool,
}

struct Current {
    file: Arc<Path>,
    records: Records,
    any: bool,
}

impl TextRows {
    /// The rows that `sources` hold: files, folders and patterns ([`find_files`]).
    ///
    /// # Errors
    /// A source that does not exist or brings no file.
    pub fn open(sources: &[PathBuf], settings: &TextSettings) -> Result<Self, DataError> {
        let plain_text = settings.template.template.plain_text().is_some();
        let files = find_files(sources, plain_text)?;
        let size = |file: &PathBuf| std::fs::metadata(file).map_or(0, |metadata| metadata.len());
        Ok(Self {
            settings: settings.clone(),
            bytes: files.iter().map(size).sum(),
            bytes_read: Arc::default(),
            files: files.into_iter(),
            current: None,
            report: RowReport {
                bad: BadRowLog::new(settings.bad_rows),
                ..RowReport::default()
            },
            ended: false,
        })
    }

    /// Size of all files on the disk, in bytes, compressed if they are.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How much of [`TextRows::bytes`] was read so far. It can be read by another thread.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes_read)
    }

    /// Share of the files that was read so far, 0 to 1.
    pub fn progress(&self) -> f64 {
        let read = self.bytes_read.load(Ordering::Relaxed);
        read as f64 / self.bytes.max(1) as f64
    }

    /// What was noticed so far.
    pub fn report(&self) -> &RowReport {
        &self.report
    }

    fn advance(&mut self) -> Result<Option<TextRow>, DataError> {
        loop {
            let Some(current) = &mut self.current else {
                match self.files.next() {
                    Some(path) => self.current = Some(self.open_file(path)?),
                    None => return self.check_any().map(|()| None),
                }
                continue;
            };
            let Some(record) = current.records.next() else {
                if !current.any {
                    self.report.empty_files.push(current.file.to_path_buf());
                }
                self.current = None;
                continue;
            };
            current.any = true;
            let file = Arc::clone(&current.file);
            match record.and_then(|record| self.row(file, record)) {
                Ok(row) => {
                    self.report.rows += 1;
                    return Ok(Some(row));
                }
                Err(error) => self.report.bad.reject(error, self.report.rows)?,
            }
        }
    }

    fn open_file(&self, path: PathBuf) -> Result<Current, DataError> {
        let template = &self.settings.template.template;
        let wanted = Wanted {
            columns: &template.columns(),
            optional: &template.optional_columns(),
            plain_text: template.plain_text(),
            max_row_bytes: self.settings.max_row_bytes,
        };
        let records = Records::open(&path, wanted, &self.bytes_read)?;
        // Of a table it is known at once that no row can be used.
        if let Some(header) = records.header()
            && let Some(wanted) = template.missing(|name| header.iter().any(|other| other == name))
        {
            let has = |name: &str| header.iter().any(|other| other == name);
            let problem = FileProblem::Columns {
                wanted,
                found: header.iter().collect(),
                template: Template::of_columns(has),
            };
            return Err(DataError::File { path, problem });
        }
        Ok(Current {
            file: path.into(),
            records,
            any: false,
        })
    }

    fn row(&mut self, file: Arc<Path>, record: Record) -> Result<TextRow, DataError> {
        let Record { line, content } = record;
        if let super::records::Content::Columns(columns) = &content
            && let Some(name) = columns.repeated()
        {
            self.report.repeated_columns += 1;
            let place = || {
                let names: super::text_error::Names = [name].iter().collect();
                format!("{}: column {names}", super::error::place(&file, line))
            };
            self.report.first_repeated.get_or_insert_with(place);
        }
        let text = self.settings.template.template.apply(content);
        match text {
            Ok(text) => {
                if let RowText::Conversation(conversation) = &text {
                    self.report.unanswered += usize::from(conversation.unanswered > 0);
                    self.report.undefined_tools += usize::from(conversation.defines_tools);
                }
                Ok(TextRow { text, file, line })
            }
            Err(problem) => Err(DataError::Row {
                path: file.to_path_buf(),
                line,
                problem: problem.into(),
            }),
        }
    }

    /// Checks at the end that there was a row at all.
    fn check_any(&self) -> Result<(), DataError> {
        let report = &self.report;
        if report.rows > 0 {
            return Ok(());
        }
        Err(match report.bad.count() {
            0 => DataError::File {
                path: report.empty_files.first().cloned().unwrap_or_default(),
                problem: FileProblem::NoRows,
            },
            _ => report.bad.no_usable_row(),
        })
    }
}

impl Iterator for TextRows {
    type Item = Result<TextRow, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let next = self.advance();
        self.ended = !matches!(next, Ok(Some(_)));
        next.transpose()
    }
}
