//! The pipeline: blocks dealt out to stages, a schedule for each, one worker thread per stage.

pub mod advice;
pub mod base;
pub mod cost;
mod engine;
pub mod failure;
pub mod fit;
pub mod gradients;
pub mod launch;
pub mod messages;
pub mod needs;
pub mod partition;
pub mod permits;
pub mod place;
pub mod prepare;
pub mod profile;
pub mod rehearsal;
pub mod schedule;
mod template;
mod transport;
mod watch;
pub mod worker;
