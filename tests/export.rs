//! `mp-train export`, and adapters made elsewhere: what is written holds the numbers that it should, and
//! computes what model and adapter compute apart.
#![allow(clippy::unwrap_used)]

#[path = "export/adapters.rs"]
mod adapters;
#[path = "export/demo.rs"]
mod demo;
#[path = "export/golden.rs"]
mod golden;
#[path = "export/merged.rs"]
mod merged;
#[path = "export/quantised.rs"]
mod quantised;
#[path = "export/refusals.rs"]
mod refusals;
#[path = "export/tiny.rs"]
mod tiny;
#[path = "export/torch.rs"]
mod torch;
