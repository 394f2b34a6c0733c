//! mp-train: fine-tuning of GLM models split over several devices.
//!
//! The modules stand in reading order; each may import only from those below it. The table of who
//! may import whom is in docs/ARCHITECTURE.md, and tests/architecture.rs holds it.

pub mod cli;

pub mod demo;

pub mod chat;

pub mod check;

pub mod eval;

pub mod train;

pub mod generate;

pub mod plan;

pub mod bench;

pub mod export;

pub mod report;

pub mod pipeline;

pub mod optim;

pub mod model;

pub mod adapter;

pub mod comm;

pub mod data;

pub mod checkpoint;

pub mod backend;

pub mod quant;

pub mod config;

pub mod random;
