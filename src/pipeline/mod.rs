//! Stages that work together: who holds which blocks, and who does what when.

pub mod partition;
pub mod schedule;
