//! What fits where: layouts, what is said when nothing fits, the plan as it is printed; and the rehearsal
//! that makes sure of it before the first step.
#![allow(clippy::unwrap_used, dead_code)]

#[path = "cuda_emulator/mod.rs"]
mod cuda_emulator;
#[path = "plan/documents.rs"]
mod documents;
#[path = "plan/fit.rs"]
mod fit;
#[path = "plan/printed.rs"]
mod printed;
#[path = "run/program.rs"]
mod program;
#[path = "plan/rehearsal.rs"]
mod rehearsal;
