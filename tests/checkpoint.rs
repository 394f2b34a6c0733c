//! The checkpoint room: golden files, round trips, hostile files, and runs killed while they save.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use mp_train::checkpoint::{CheckpointError, HostTensor, TensorSource};

#[path = "checkpoint/golden.rs"]
mod golden;
#[path = "checkpoint/hostile.rs"]
mod hostile;
#[path = "checkpoint/hostile_adapters.rs"]
mod hostile_adapters;
#[path = "checkpoint/hostile_bounded.rs"]
mod hostile_bounded;
#[path = "checkpoint/hostile_corpus.rs"]
mod hostile_corpus;
#[path = "checkpoint/killed.rs"]
mod killed;
#[path = "checkpoint/mutations.rs"]
mod mutations;
#[path = "checkpoint/run_state.rs"]
mod run_state;
#[path = "checkpoint/torch_bytes.rs"]
mod torch_bytes;

fn golden_path(rest: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/chatglm-6b")
        .join(rest)
}

/// The values of a tensor as `f32` bit patterns, so that comparing them is exact.
fn bits(tensor: &HostTensor) -> Vec<u32> {
    let values = tensor.to_f32().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// The message of an error, which must name `file` and contain `part`.
#[track_caller]
fn assert_says<T>(result: Result<T, CheckpointError>, file: &Path, part: &str) {
    let Err(error) = result else {
        panic!("{}: no error, expected one about {part}", file.display());
    };
    let text = error.to_string();
    assert!(
        text.contains(file.to_str().unwrap()),
        "{text}: does not name {}",
        file.display()
    );
    assert!(text.contains(part), "{text}: does not say '{part}'");
}

/// Opens a folder and reads everything in it, as a loader would.
fn read_model(folder: &Path) -> Result<usize, CheckpointError> {
    let model = mp_train::checkpoint::ModelFolder::open(folder)?;
    let mut bytes = 0;
    for name in model.names() {
        bytes += model.read(&name)?.bytes.len();
    }
    Ok(bytes)
}

/// A small fixed-seed generator (xorshift64*).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}
