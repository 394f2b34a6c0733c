//! mp-train
pub mod model;
pub mod adapter;
pub mod checkpoint;
pub mod backend;
pub mod config;
pub mod random;
