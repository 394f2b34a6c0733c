//! mp-train
pub mod backend;
pub mod config;
pub mod random;
