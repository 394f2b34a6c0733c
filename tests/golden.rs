//! Every reference case of a family folder, by the engine.
//!
//! `GOLDEN_DIR=<folder> cargo test --release --test golden`; without it, tests/golden/chatglm-6b. The
//! folder's README says what each case is; sizes, ids, ranks, lengths and steps are read from its
//! files. One line per case and variant: `case max_error limit ok|FAIL`, with the tensor that comes
//! closest to its limit.
#![allow(clippy::unwrap_used)]

mod golden_cases;

use std::path::{Path, PathBuf};

use mp_train::backend::cpu::Cpu;

#[test]
fn golden() {
    let folder = std::env::var_os("GOLDEN_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/chatglm-6b"),
        PathBuf::from,
    );
    let failed = golden_cases::run::<Cpu<f32>>(&folder).unwrap();
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
}
