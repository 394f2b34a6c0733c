//! Several pretend GPUs (tests/cuda_emulator), from outside: the golden runs end in the same bits on one
//! GPU and on several, by NCCL and by peer copies, however late the work is done; and what is said where
//! GPUs cannot be connected. Skipped without g++; MP_TRAIN_REQUIRE_EMULATOR=1 makes that a failure.
#![allow(clippy::unwrap_used, dead_code)]

#[path = "gpu_pipeline/bits.rs"]
mod bits;
#[path = "gpu_pipeline/connected.rs"]
mod connected;
#[path = "cuda_emulator/mod.rs"]
mod cuda_emulator;
#[path = "run/family.rs"]
mod family;
#[path = "gpu_pipeline/faults.rs"]
mod faults;
#[path = "gpu_run/gpu.rs"]
mod gpu;
#[path = "run/layout.rs"]
mod layout;
#[path = "run/outcome.rs"]
mod outcome;
#[path = "run/program.rs"]
mod program;
#[path = "run/setup.rs"]
mod setup;
