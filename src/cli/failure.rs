//! What the user is told when a command fails, and the exit code. The only place where errors become
//! text.

use std::error::Error;
use std::io::Write;

use crate::config::error::ConfigError;
pub use crate::report::FailureClass;

/// A command that failed: whose turn it is, why, and what to do.
#[derive(Debug)]
pub struct Failure {
    class: FailureClass,
    message: String,
    hint: Option<String>,
    last_line: Option<String>,
}

impl Failure {
    /// A failure from an error and all its causes.
    pub fn new(class: FailureClass, error: &dyn Error) -> Self {
        Failure {
            class,
            message: chain(error),
            hint: None,
            last_line: None,
        }
    }

    /// A failure from a text.
    pub fn of_class(class: FailureClass, message: impl Into<String>) -> Self {
        Failure {
            class,
            message: message.into(),
            hint: None,
            last_line: None,
        }
    }

    /// A failure that is the user's to fix, from a text.
    pub fn user(message: impl Into<String>) -> Self {
        Self::of_class(FailureClass::User, message)
    }

    /// The end of a run that was asked for by a signal.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::of_class(FailureClass::Interrupted, message)
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// How to go on from here; the last that is said.
    #[must_use]
    pub fn last_line(mut self, line: impl Into<String>) -> Self {
        self.last_line = Some(line.into());
        self
    }

    /// The process's exit code: 2 the user, 1 machine or bug, 3 diverged, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self.class {
            FailureClass::User => 2,
            FailureClass::Machine => 1,
            FailureClass::Diverged => 3,
            FailureClass::Interrupted => 130,
        }
    }

    /// Tells the user on standard error and gives the exit code.
    pub fn report(&self) -> u8 {
        let lead = match self.class {
            FailureClass::Interrupted => "interrupted",
            FailureClass::User | FailureClass::Machine | FailureClass::Diverged => "error",
        };
        let mut text = format!("{lead}: {}\n", self.message);
        if let Some(hint) = &self.hint {
            text.push_str(&format!("hint: {hint}\n"));
        }
        if let Some(line) = &self.last_line {
            text.push_str(line);
            text.push('\n');
        }
        // Nobody is left to tell when standard error is closed; the exit code still says it.
        let _ = std::io::stderr().write_all(text.as_bytes());
        self.exit_code()
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let failure = Failure::new(FailureClass::User, &error);
        match &error {
            ConfigError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                failure.hint("relative paths are relative to the current directory")
            }
            ConfigError::Missing { key, .. } if key.section == "model" => {
                failure.hint(super::WHERE_TO_GET_A_MODEL)
            }
            ConfigError::Missing { key, .. } if key.name == "max_steps" => {
                failure.hint("or --epochs 3, to go through all rows three times")
            }
            _ => failure,
        }
    }
}

/// The error and its causes in one line, leaving out a cause that the text above it already tells.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot load the model")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("disk: {0}")]
    struct Inner(#[source] std::fmt::Error);

    #[test]
    fn a_chain_tells_each_cause_once() {
        let text = chain(&Outer(Inner(std::fmt::Error)));
        let cause = std::fmt::Error.to_string();
        assert_eq!(text, format!("cannot load the model: disk: {cause}"));
    }

    #[test]
    fn every_class_has_its_exit_code() {
        for (class, code) in [
            (FailureClass::User, 2),
            (FailureClass::Machine, 1),
            (FailureClass::Diverged, 3),
            (FailureClass::Interrupted, 130),
        ] {
            assert_eq!(Failure::new(class, &std::fmt::Error).exit_code(), code);
        }
    }
}
