//! Everything that can be wrong with training data, each with its file and line.

use std::path::{Path, PathBuf};

use super::source::NamedKind;
use super::text_error::{FileProblem, TextProblem, skipped_examples};
use super::text_rows::EncodeError;

/// A place in a file: a line, or of a table that has none a row.
pub(super) fn place(path: &Path, line: usize) -> String {
    match NamedKind::of(path) {
        Some(NamedKind::Parquet) => format!("{}, row {line}", path.display()),
        _ => format!("{}:{line}", path.display()),
    }
}

/// Why training data cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file that cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file without any row.
    #[error("{path}: no rows; expected one JSON object per line")]
    NoRows {
        /// The file.
        path: PathBuf,
    },
    /// A row that cannot be used.
    #[error("{}: {problem}", place(.path, *.line))]
    Row {
        /// The file.
        path: PathBuf,
        /// Line, of Parquet the row, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: RowProblem,
    },
    /// A file or folder that cannot be used as a whole.
    #[error("{path}: {problem}")]
    File {
        /// The file, the folder or the pattern.
        path: PathBuf,
        /// What is wrong with it.
        problem: FileProblem,
    },
    /// A file that cannot be read on from some place.
    #[error("{}: {problem}", place(.path, *.line))]
    Broken {
        /// The file.
        path: PathBuf,
        /// Line, of Parquet the row, counted from 1.
        line: usize,
        /// What is wrong there.
        problem: FileProblem,
    },
    /// Rows, but none that can be used.
    #[error(
        "none of the first {rows} rows can be used; is this the right template, and are its column \
         names those of the data?{}",
        skipped_examples(.examples)
    )]
    NoUsableRow {
        /// Rows that were looked at.
        rows: usize,
        /// The first of them, each with file, line and reason.
        examples: Vec<String>,
    },
    /// Settings or a tokenizer that rows cannot be made with.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Rows of text, but nothing that makes ids of it.
    #[error(
        "{path}: rows of text, but there is no tokenizer; put the model's own (ice_text.model, tokenizer.model \
         or tokenizer.json) into its folder, or give rows of token ids"
    )]
    NoTokenizer {
        /// The file.
        path: PathBuf,
    },
    /// A token cache that cannot be written.
    #[error(
        "{path}: cannot write the token cache (about 8 bytes per token; --cache puts it into another \
         folder, where there is room): {source}"
    )]
    Cache {
        /// The cache file or its folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file that someone writes to.
    #[error("{path}: changed while it was read; start again when it is complete")]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// A share of rows for validation that leaves too little.
    #[error(
        "validation_split = {share} of {rows} rows: it must be above 0, below 1, and leave a row on \
         either side"
    )]
    Split {
        /// The share asked for.
        share: f64,
        /// Rows there are.
        rows: usize,
    },
    /// Two ways to say what is kept for validation.
    #[error("give either validation files or validation_split, not both")]
    ValidationTwice,
    /// The caller wanted no more.
    #[error("interrupted while the training data was read; what was written is removed")]
    Interrupted,
    /// A saved position that this data does not have.
    #[error(
        "the saved position is row {row} of an epoch, but the data has {rows} rows: it has changed \
         since the checkpoint was written; put the old data back or start a new run"
    )]
    Position {
        /// Rows that were consumed.
        row: usize,
        /// Rows there are.
        rows: usize,
    },
}

impl DataError {
    /// Whether the machine is to blame, not the user's files or settings.
    pub fn is_machine(&self) -> bool {
        use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match self {
            Self::Cache { source, .. } => {
                matches!(source.kind(), FileTooLarge | QuotaExceeded | StorageFull)
            }
            _ => false,
        }
    }
}

/// What is wrong with one row.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowProblem {
    /// Bytes that are no text.
    #[error("not UTF-8 at byte {byte} of the line; save the file as UTF-8")]
    NotUtf8 {
        /// Offset in the line, from 0.
        byte: usize,
    },
    /// No JSON object of the expected form.
    #[error("{message} (column {column})")]
    Json {
        /// What the parser said.
        message: String,
        /// Column, from 1.
        column: usize,
    },
    /// A line longer than any row can be.
    #[error("the line is longer than {limit} bytes; expected one JSON object per line")]
    LineTooLong {
        /// Longest line that is read, in bytes.
        limit: usize,
    },
    /// A blank line with rows after it.
    #[error("blank line between rows; remove it")]
    Blank,
    /// No tokens.
    #[error("`input_ids` is empty")]
    Empty,
    /// Two lists that do not fit.
    #[error("`{name}` has {found} entries, `input_ids` has {expected}")]
    Length {
        /// Key of the list.
        name: &'static str,
        /// Its length.
        found: usize,
        /// Number of tokens.
        expected: usize,
    },
    /// An id the model does not have.
    #[error(
        "`{name}[{index}]` is {found}, which is no id of this model (vocab_size {vocab_size}{})",
        if *.name == "labels" { ", or -100 for no target" } else { "" }
    )]
    Id {
        /// Key of the list.
        name: &'static str,
        /// Place in the list.
        index: usize,
        /// What stands there.
        found: i64,
        /// Ids of the model are below this.
        vocab_size: usize,
    },
    /// A position the model does not have.
    #[error(
        "`position_ids[{list}][{index}]` is {found}; positions are below {limit} \
         (max_sequence_length)"
    )]
    Position {
        /// 0: in the context, 1: in the block.
        list: usize,
        /// Place in the list.
        index: usize,
        /// What stands there.
        found: u32,
        /// Positions are below this.
        limit: usize,
    },
    /// A context that is longer than the row.
    #[error("`context_length` is {found}, but the row has {tokens} tokens")]
    Context {
        /// The context length given.
        found: usize,
        /// Tokens of the row.
        tokens: usize,
    },
    /// A row that does not fit the model.
    #[error("{tokens} tokens; the model takes at most {limit} (max_sequence_length)")]
    TooLong {
        /// Tokens up to the last one that matters.
        tokens: usize,
        /// Most that the model takes.
        limit: usize,
    },
    /// No answer begins.
    #[error(
        "no sop (id {bos_token_id}) in `input_ids`; positions and context follow from it unless \
         `position_ids` and `context_length` are given"
    )]
    NoSop {
        /// The id looked for.
        bos_token_id: u32,
    },
    /// No place for the answer.
    #[error(
        "neither [gMASK] (id {gmask_token_id}) nor [MASK] (id {mask_token_id}) in `input_ids`; \
         positions follow from it unless `position_ids` are given"
    )]
    NoMask {
        /// Id of `[gMASK]`.
        gmask_token_id: u32,
        /// Id of `[MASK]`.
        mask_token_id: u32,
    },
    /// A row of text that the template cannot use.
    #[error(transparent)]
    Text(#[from] TextProblem),
    /// Nothing to learn.
    #[error(
        "no target: every label after the first is -100, so nothing can be learnt from the row"
    )]
    NoTarget,
}
