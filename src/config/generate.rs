//! What `mp-train generate` was asked to do, checked.

use std::path::PathBuf;

use super::resolve;
use super::run::{Device, Precision};

/// How to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// Folder with `config.json` and the weights.
    pub model: PathBuf,
    /// Adapter folder (PEFT LoRA or THUDM prefix); none: the base model alone.
    pub adapter: Option<PathBuf>,
    /// Storage type of weights and activations.
    pub precision: Precision,
    /// One stage per entry.
    pub devices: Vec<Device>,
    /// Blocks per stage, as many as devices; chosen by cost when absent.
    pub balance: Option<Vec<usize>>,
    /// CPU threads for all stages together.
    pub threads: usize,
    /// Most ids to generate for one prompt.
    pub max_new_tokens: usize,
    /// Whether an answer ends at eop (`eos_token_id`).
    pub stop_at_eop: bool,
}

impl GenerateOptions {
    /// The defaults over `devices`: greedy, 128 new ids at most, ending at eop, all cores.
    pub fn new(model: PathBuf, devices: Vec<Device>) -> Self {
        GenerateOptions {
            model,
            adapter: None,
            precision: resolve::default_precision(&devices),
            devices,
            balance: None,
            threads: resolve::default_threads(),
            max_new_tokens: 128,
            stop_at_eop: true,
        }
    }
}

/// One prompt of the input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// Line in the input, from 1, for messages.
    pub line: usize,
    /// Token ids, at least one; ends in `.. gMASK sop`.
    pub input_ids: Vec<u32>,
    /// Keys visible to all queries; the index of sop when absent.
    pub context_length: Option<usize>,
    /// Both position rows, each as long as `input_ids`; by the usual rule when absent.
    pub position_ids: Option<[Vec<u32>; 2]>,
}
