//! mp-train

pub mod config;
pub mod data;
