//! mp-train

pub mod checkpoint;
