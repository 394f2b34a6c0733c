//! Model-parallel fine-tuning of GLM models.

pub mod cli;
pub mod config;
pub mod report;
