//! mp-train

pub mod pipeline;

pub mod optim;

pub mod data;

pub mod config;

pub mod random;
