//! What the user wrote and what it means: run configuration and the model's `config.json`.

pub mod model;
pub mod run;
