//! Why a configuration was refused.

use std::fmt;
use std::path::PathBuf;

/// Why a configuration was refused: where it stands, what was found, what is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file could not be read.
    #[error("cannot read {path}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A TOML file that does not parse, or a key or section that does not exist.
    #[error("{path}:{line}: {message}", path = path.display())]
    Toml {
        /// The file.
        path: PathBuf,
        /// Line in the file, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value that is not allowed.
    #[error("{place}: must be {allowed}")]
    Invalid {
        /// Where the value stands, and the value.
        place: Place,
        /// What is allowed.
        allowed: String,
    },
    /// A key that the chosen `adapter.kind` does not have.
    #[error("{place}: this key belongs to kind {belongs_to}, but adapter.kind is {kind}")]
    WrongKind {
        /// Where the key stands.
        place: Place,
        /// The kinds that have it, quoted.
        belongs_to: &'static str,
        /// The kind that was chosen, quoted.
        kind: &'static str,
    },
    /// A key that has no default was not given.
    #[error("{key} is not set: give {flag} {example}, or `{name} = {example}` under [{section}]",
        flag = key.flag(), name = key.name, section = key.section)]
    Missing {
        /// The key.
        key: Key,
        /// A value it could have, as TOML.
        example: &'static str,
    },
    /// A model's `config.json` that cannot be used.
    #[error("{path}: {message}", path = path.display())]
    Model {
        /// The `config.json`.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A configuration that cannot be written as TOML (a path that is not UTF-8).
    #[error("the configuration cannot be written as TOML")]
    Write(#[from] toml::ser::Error),
}

/// The name of a configuration key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// The TOML section.
    pub section: &'static str,
    /// The key in that section.
    pub name: &'static str,
}

impl Key {
    /// The flag that sets the same thing: the key in kebab-case, but `--model` for `model.path`.
    pub fn flag(&self) -> String {
        match (self.section, self.name) {
            ("model", "path") => "--model".to_owned(),
            (_, name) => format!("--{}", name.replace('_', "-")),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}", self.section, self.name)
    }
}

/// Where a value stands, with the value as it was written there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The key.
    pub key: Key,
    /// File, flag or default.
    pub origin: Origin,
    /// The value, as the user wrote it or as TOML.
    pub found: String,
}

/// Who said so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The command line.
    Flag,
    /// A TOML file.
    File {
        /// The file.
        path: PathBuf,
        /// Line of the key, from 1.
        line: usize,
    },
    /// Nobody: the value is the default.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Key { section, name } = self.key;
        let found = &self.found;
        match &self.origin {
            Origin::Flag => write!(out, "{} {found}", self.key.flag()),
            Origin::File { path, line } => {
                write!(
                    out,
                    "{}:{line}: [{section}] {name} = {found}",
                    path.display()
                )
            }
            Origin::Default => write!(out, "[{section}] {name} = {found} (the default)"),
        }
    }
}
