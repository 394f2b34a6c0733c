//! The pretend GPUs themselves: that they run kernels through the unmodified bindings, find what a
//! program forgets, and refuse what a GPU refuses.

#![allow(clippy::unwrap_used)]

mod cuda_emulator;
#[path = "cuda_emulator/bench/devices.rs"]
mod devices;
#[path = "cuda_emulator/bench/faults.rs"]
mod faults;
#[path = "cuda_emulator/bench/gpu.rs"]
mod gpu;
#[path = "cuda_emulator/bench/kernels.rs"]
mod kernels;
#[path = "cuda_emulator/bench/nccl.rs"]
mod nccl;
#[path = "cuda_emulator/bench/products.rs"]
mod products;
#[path = "cuda_emulator/bench/ranks.rs"]
mod ranks;
#[path = "cuda_emulator/bench/refusals.rs"]
mod refusals;
#[path = "cuda_emulator/bench/streams.rs"]
mod streams;
