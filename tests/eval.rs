//! `mp-train eval` as a user runs it, and its scores against those of the Python packages.
#![allow(clippy::unwrap_used)]

#[path = "eval/answers.rs"]
mod answers;
#[path = "eval/losses.rs"]
mod losses;
#[path = "eval/recipes.rs"]
mod recipes;
#[path = "eval/refusals.rs"]
mod refusals;
#[path = "eval/scores.rs"]
mod scores;
#[allow(dead_code, reason = "chat's tests need more of it")]
#[path = "generate/setup.rs"]
mod setup;
