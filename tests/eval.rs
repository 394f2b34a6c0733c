//! `mp-train eval` as a user runs it, and its scores against those of the Python packages.
#![allow(clippy::unwrap_used)]

#[path = "eval/scores.rs"]
mod scores;
