//! The pipeline: blocks dealt out to stages, a schedule for each, one worker thread per stage.

pub mod base;
mod engine;
pub mod failure;
pub mod gradients;
pub mod launch;
pub mod messages;
pub mod partition;
pub mod permits;
pub mod place;
pub mod prepare;
pub mod schedule;
mod template;
mod transport;
mod watch;
pub mod worker;
