//! Why a file could not be read or written, said to the person at the terminal.

use std::io;
use std::path::{Path, PathBuf};

use super::tensor::Dtype;

/// Why a file could not be read or written.
///
/// Each message names the file, what was found in it and what to do. Causes are part of the message
/// and not chained as `source`, so that a printed chain does not say them twice.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The system refused to read a file or folder.
    #[error("cannot read {path}: {cause}. {}", remedy(.cause))]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The system refused to write, rename or remove a file or folder.
    #[error("cannot write {path}: {cause}. {}", remedy(.cause))]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// A folder was expected and there is none.
    #[error("{path} is not a folder. Give the path of {wanted}")]
    NotAFolder {
        /// The path given.
        path: PathBuf,
        /// What the folder should have been.
        wanted: &'static str,
    },
    /// A folder, pipe or device stands where a file was expected.
    #[error("{path} is not a plain file. Put the real file there")]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A link that leads out of the folder it stands in.
    #[error(
        "{path} is a link to {target}, outside of its folder. Put the file itself there, or give the \
         folder that it lies in"
    )]
    Outside {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// No weights under any of the known names.
    #[error(
        "{path} holds no weights: looked for {looked_for}. Download the weight files into this folder, \
         or give the folder that has them"
    )]
    NoWeights {
        /// The folder.
        path: PathBuf,
        /// The names that were looked for.
        looked_for: String,
    },
    /// A Git LFS pointer, a few lines of text, instead of the file it stands for.
    #[error(
        "{path} is a Git LFS pointer, not the file itself. Run `git lfs pull` in its folder, or \
         download the file again"
    )]
    LfsPointer {
        /// The pointer file.
        path: PathBuf,
    },
    /// A file beyond the size that this kind of file can sensibly have.
    #[error(
        "{path} has {size} bytes, more than the {limit} accepted for {what}. Check that it is the right file"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// The most bytes accepted.
        limit: u64,
        /// What kind of file it was read as.
        what: &'static str,
    },
    /// A file of tensors that contradicts itself or was cut short.
    #[error("{path} cannot be used: {reason}. Download or save it again")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor of an element type that is not read here.
    #[error(
        "{path}: tensor '{tensor}' has element type {found}, which is not supported. Convert it to one \
         of F16, BF16, F32, F64, I8, U8, I16, I32, I64, BOOL"
    )]
    UnsupportedDtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The element type it has.
        found: String,
    },
    /// A tensor that was asked for and is not there.
    #[error(
        "{path} has no tensor '{tensor}'. Check that the files belong to the model in config.json"
    )]
    NoSuchTensor {
        /// The file or folder.
        path: PathBuf,
        /// The tensor asked for.
        tensor: String,
    },
    /// An index file that does not fit the shards beside it.
    #[error("{path}: {reason}. Download the index and all the files it names again")]
    Index {
        /// The index file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A JSON file that is not valid JSON or lacks something.
    #[error("{path} is not the JSON expected: {reason}. Correct it or restore the original")]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column where known.
        reason: String,
    },
    /// A setting of an adapter that cannot be honoured.
    #[error("{path}: {field} is {found}. {remedy}")]
    Setting {
        /// The configuration file.
        path: PathBuf,
        /// The field.
        field: &'static str,
        /// Its value.
        found: String,
        /// Why it is refused and what to do.
        remedy: String,
    },
    /// A field of an adapter's configuration that nobody here knows, and that says something.
    #[error(
        "{path}: {field} is {found}, a setting that this program does not know and that may change what \
         the adapter computes. Remove it if it does not, or convert the adapter to a plain LoRA with PEFT"
    )]
    UnknownSetting {
        /// The configuration file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value.
        found: String,
    },
    /// Tensors of an adapter that do not fit together or do not fit its configuration.
    #[error(
        "{path}: {reason}. Check that tensors and configuration come from the same training run"
    )]
    Mismatch {
        /// The file or folder.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// A tensor in memory whose shape and bytes disagree.
    #[error(
        "a tensor of type {dtype} and shape {shape:?} cannot have {bytes} bytes. Give one element for each place of the shape"
    )]
    Shape {
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// The bytes it has.
        bytes: usize,
    },
    /// A tensor whose elements cannot be taken for what was asked.
    #[error("its elements are {found} where {wanted} are needed. Convert the file that holds it")]
    Elements {
        /// The element type found.
        found: Dtype,
        /// What was needed.
        wanted: &'static str,
    },
    /// An error about one tensor of a file; see [`CheckpointError::in_tensor`].
    #[error("{path}: tensor '{tensor}': {cause}")]
    InTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        cause: Box<CheckpointError>,
    },
    /// A saved state of a run that is incomplete or was changed.
    #[error(
        "checkpoint {path} cannot be used: {reason}. Resume from another one, or delete this folder"
    )]
    Broken {
        /// The checkpoint folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something in a checkpoint folder that cannot be part of a checkpoint.
    #[error("cannot save {path}: {reason}. Earlier checkpoints are untouched; please report this")]
    Unsavable {
        /// The folder or the thing in it.
        path: PathBuf,
        /// Why it cannot be saved.
        reason: String,
    },
    /// Another process is saving into the same folder.
    #[error("another run is saving into {path} right now. Give each run its own output folder")]
    Busy {
        /// The output folder.
        path: PathBuf,
    },
    /// The new checkpoint was saved, but an old one could not be deleted.
    #[error(
        "{saved} was saved, but the old {path} could not be removed: {cause}. Delete it by hand before the disk fills"
    )]
    Prune {
        /// The checkpoint that was saved and is good.
        saved: PathBuf,
        /// The folder that should have gone.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
}

impl CheckpointError {
    /// Whether the machine (a full disk, a broken one) or a bug is to blame, not the user's files or
    /// paths.
    pub fn is_machine(&self) -> bool {
        use io::ErrorKind;
        match self {
            CheckpointError::Write { cause, .. } => !matches!(
                cause.kind(),
                ErrorKind::PermissionDenied
                    | ErrorKind::NotFound
                    | ErrorKind::NotADirectory
                    | ErrorKind::IsADirectory
                    | ErrorKind::AlreadyExists
                    | ErrorKind::ReadOnlyFilesystem
            ),
            CheckpointError::Unsavable { .. } => true,
            _ => false,
        }
    }

    /// Says which tensor of which file the error is about.
    #[must_use]
    pub fn in_tensor(self, path: &Path, tensor: &str) -> Self {
        Self::InTensor {
            path: path.to_owned(),
            tensor: tensor.to_owned(),
            cause: Box::new(self),
        }
    }

    pub(super) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |cause| Self::Read { path, cause }
    }

    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |cause| Self::Write { path, cause }
    }

    pub(super) fn damaged(path: &Path, reason: impl AsRef<str>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            reason: printable(reason.as_ref().trim_end_matches('.')),
        }
    }

    pub(super) fn mismatch(path: &Path, reason: impl Into<String>) -> Self {
        Self::Mismatch {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}

/// A reason that may hold names out of the file: not longer than a person reads, and without the
/// characters that a terminal would obey.
fn printable(reason: &str) -> String {
    const LONGEST: usize = 400;
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    let mut text: String = reason.chars().map(plain).take(LONGEST).collect();
    if reason.chars().nth(LONGEST).is_some() {
        text.push('…');
    }
    text
}

/// What to do about an error of the system.
fn remedy(cause: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match cause.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => {
            "The disk or your quota is full: free some space, lower save_total_limit, or choose \
             another output folder"
        }
        Kind::PermissionDenied => "Check who owns it and its permissions",
        Kind::ReadOnlyFilesystem => "The disk is mounted read-only: choose another folder",
        Kind::NotFound => "Check the path",
        Kind::NotADirectory | Kind::AlreadyExists => {
            "A file stands where a folder is needed: choose another folder or move the file away"
        }
        Kind::FileTooLarge => "The file system does not take files of this size: use another disk",
        _ => "Check the disk and the path",
    }
}
