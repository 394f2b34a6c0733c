//! What the user wrote and what it means: run configuration and the model's `config.json`.
//!
//! What was typed ([`raw::RawConfig`], once per TOML file and once per command line) and what it means
//! ([`run::RunConfig`]) are two types; [`layers::Layers::resolve`] leads from the first to the second.
//! This room imports nothing of the rest of the crate.
//!
//! Relative paths are relative to the current directory, inside a TOML file too: the same text means
//! the same place whether it stands in the file or behind a flag.

pub mod architecture;
pub mod byte_size;
pub mod device;
pub mod error;
pub mod file;
pub mod generate;
mod keys;
pub mod layers;
pub mod model;
pub mod model_size;
pub mod paths;
pub mod raw;
mod resolve;
pub mod run;
mod setting;
mod spelling;
