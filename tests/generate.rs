//! `mp-train generate` and `mp-train chat` as a user runs them: text and ids in and out, sampled and
//! greedy, with base and adapters, over one and more stages.
#![allow(clippy::unwrap_used)]

#[path = "generate/conversations.rs"]
mod conversations;
#[path = "generate/refusals.rs"]
mod refusals;
#[path = "generate/rows.rs"]
mod rows;
#[path = "generate/sampled.rs"]
mod sampled;
#[path = "generate/setup.rs"]
mod setup;
