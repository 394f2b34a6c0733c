//! The program on pretend GPUs (tests/cuda_emulator), from outside: the golden training runs, runs that
//! are cut off and go on elsewhere, answers, what a step costs in calls of the driver, and what is said
//! when there is no GPU or it fails. Skipped without g++; MP_TRAIN_REQUIRE_EMULATOR=1 makes that a
//! failure.
#![allow(clippy::unwrap_used, dead_code)]

#[path = "gpu_run/answers.rs"]
mod answers;
#[path = "gpu_run/cases.rs"]
mod cases;
#[path = "cuda_emulator/mod.rs"]
mod cuda_emulator;
#[path = "gpu_run/f16_sums.rs"]
mod f16_sums;
#[path = "run/family.rs"]
mod family;
#[path = "gpu_run/golden.rs"]
mod golden;
#[path = "gpu_run/gpu.rs"]
mod gpu;
#[path = "gpu_run/kernel_cache.rs"]
mod kernel_cache;
#[path = "gpu_run/launches.rs"]
mod launches;
#[path = "run/layout.rs"]
mod layout;
#[path = "gpu_run/memory.rs"]
mod memory;
#[path = "text_run/model.rs"]
mod model;
#[path = "run/outcome.rs"]
mod outcome;
#[path = "run/program.rs"]
mod program;
#[path = "gpu_run/quantised.rs"]
mod quantised;
#[path = "gpu_run/refused.rs"]
mod refused;
#[path = "gpu_run/resumed.rs"]
mod resumed;
#[path = "run/setup.rs"]
mod setup;
#[path = "generate/setup.rs"]
mod text_setup;
#[path = "gpu_run/trace.rs"]
mod trace;
#[path = "refusals/world.rs"]
mod world;
