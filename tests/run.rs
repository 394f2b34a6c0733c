//! The program as a user runs it: training on the golden models, runs that are cut off and taken up
//! again, answers, and what it says when something is wrong.
//!
//! `GOLDEN_DIR=<family folder>` runs the same on another model family of the same layout.
#![allow(clippy::unwrap_used)]

#[path = "run/family.rs"]
mod family;
#[path = "run/generation.rs"]
mod generation;
#[path = "run/golden_training.rs"]
mod golden_training;
#[path = "run/half_precision.rs"]
mod half_precision;
#[path = "run/interrupted.rs"]
mod interrupted;
#[path = "run/later_generations.rs"]
mod later_generations;
#[path = "run/layout.rs"]
mod layout;
#[path = "run/outcome.rs"]
mod outcome;
#[path = "run/program.rs"]
mod program;
#[path = "run/quantised.rs"]
mod quantised;
#[path = "run/refused_models.rs"]
mod refused_models;
#[path = "run/refused_runs.rs"]
mod refused_runs;
#[path = "run/setup.rs"]
mod setup;
