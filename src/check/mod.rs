//! `mp-train check`: everything that would go wrong in a long run, found before it begins.
//!
//! A run stops at the first thing that is wrong. This reads configuration, model, tokenizer, adapter,
//! rows, devices and output folder together and goes on where it can, so that all of it is said at once.

mod model;
mod place;
mod rows;

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use crate::config::run::RunConfig;
use crate::data::cache::Progress;

/// Examples that are shown of things that there are many of.
const EXAMPLES: usize = 5;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// A run would not go through.
    Problem,
    /// It would, but somebody should know.
    Warning,
}

/// What a finding is about, in the order in which they are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum About {
    /// `config.json` and the weights.
    Model,
    /// The tokenizer's files, and whether they are the model's.
    Tokenizer,
    /// What is to be trained, and what it starts from.
    Adapter,
    /// Training rows.
    Rows,
    /// Validation rows.
    ValidationRows,
    /// The devices and their memory.
    Devices,
    /// The folder that the run writes to, and what it goes on from.
    Output,
}

impl About {
    fn word(self) -> &'static str {
        match self {
            About::Model => "model",
            About::Tokenizer => "tokenizer",
            About::Adapter => "adapter",
            About::Rows => "rows",
            About::ValidationRows => "validation rows",
            About::Devices => "devices",
            About::Output => "output",
        }
    }
}

/// Something that is wrong, or that somebody should know.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub about: About,
    /// How often it is there.
    pub count: usize,
    /// What it is.
    pub message: String,
    /// Some of the places, where there are several.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<String>,
}

/// Something that was found to be in order, in words.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fact {
    /// What it is about.
    pub about: About,
    /// What it is.
    pub text: String,
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// What there is.
    pub facts: Vec<Fact>,
    /// What is wrong with it.
    pub findings: Vec<Finding>,
}

impl Report {
    fn fact(&mut self, about: About, text: String) {
        self.facts.push(Fact { about, text });
    }

    fn add(&mut self, severity: Severity, about: About, message: impl ToString) {
        self.findings.push(Finding {
            severity,
            about,
            count: 1,
            message: message.to_string(),
            examples: Vec::new(),
        });
    }

    fn problem(&mut self, about: About, message: impl ToString) {
        self.add(Severity::Problem, about, message);
    }

    fn warning(&mut self, about: About, message: impl ToString) {
        self.add(Severity::Warning, about, message);
    }

    fn count(&self, severity: Severity) -> usize {
        let findings = self.findings.iter();
        findings
            .filter(|finding| finding.severity == severity)
            .count()
    }

    /// Kinds of things that would keep a run from going through.
    pub fn problems(&self) -> usize {
        self.count(Severity::Problem)
    }

    /// Kinds of things that somebody should know.
    pub fn warnings(&self) -> usize {
        self.count(Severity::Warning)
    }

    /// For the person at the terminal.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        for fact in &self.facts {
            let _ = writeln!(text, "{:<15} {}", fact.about.word(), fact.text);
        }
        for severity in [Severity::Problem, Severity::Warning] {
            let lead = match severity {
                Severity::Problem => "problem",
                Severity::Warning => "warning",
            };
            let findings = self.findings.iter();
            for finding in findings.filter(|finding| finding.severity == severity) {
                let _ = writeln!(
                    text,
                    "{lead}: {}: {}",
                    finding.about.word(),
                    finding.message
                );
                for example in &finding.examples {
                    let _ = writeln!(text, "  {example}");
                }
                if finding.count > finding.examples.len() && !finding.examples.is_empty() {
                    let more = finding.count - finding.examples.len();
                    let _ = writeln!(text, "  and {more} more");
                }
            }
        }
        text
    }
}

/// Checks everything that a run by `config` would come across; `None` when a signal came meanwhile.
pub fn run(config: &RunConfig, stop: &AtomicBool) -> Option<Report> {
    let mut report = Report::default();
    let mut on_progress = |_: Progress| match stop.load(Ordering::Relaxed) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    };
    let model = model::check(&mut report, config);
    let tokenizer = model::tokenizer(&mut report, config, model.as_ref());
    let trainables = model
        .as_ref()
        .and_then(|model| model::adapter(&mut report, config, model));
    let rows = rows::check(
        &mut report,
        config,
        model.as_ref(),
        tokenizer.as_ref(),
        &mut on_progress,
    );
    place::devices(&mut report, config);
    if report.problems() == 0 && !stop.load(Ordering::Relaxed) {
        place::layout(&mut report, config, &mut on_progress);
    }
    place::output(&mut report, config, trainables.as_ref(), rows.as_ref());
    (!stop.load(Ordering::Relaxed)).then_some(report)
}
