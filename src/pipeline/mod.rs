//! The pipeline: blocks dealt out to stages, a schedule for each, one worker thread per stage.

pub mod base;
pub mod failure;
pub mod gradients;
pub mod launch;
pub mod messages;
pub mod partition;
pub mod permits;
pub mod prepare;
pub mod schedule;
mod template;
mod transport;
pub mod worker;
