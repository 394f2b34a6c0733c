//! The rooms that read files of other people, by themselves: without the engine they are built with a
//! sanitizer in minutes.
#![allow(dead_code, missing_docs)]

#[path = "../../../src/checkpoint/mod.rs"]
pub mod checkpoint;
#[path = "../../../src/config/mod.rs"]
pub mod config;
#[path = "../../../src/random.rs"]
pub mod random;

pub mod data;
