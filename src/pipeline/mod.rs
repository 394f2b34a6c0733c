//! The pipeline: blocks dealt out to stages, a schedule for each, one worker thread per stage.

pub mod advice;
pub mod base;
pub mod cost;
pub mod failure;
pub mod fit;
pub mod gradients;
pub mod launch;
pub mod messages;
pub mod needs;
pub mod partition;
pub mod permits;
pub mod prepare;
pub mod rehearsal;
pub mod schedule;
mod template;
pub mod worker;
