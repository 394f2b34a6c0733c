//! Which kernels a step launches, and which it does not, because their work is done in one pass with another's.

use std::path::Path;

use super::gpu::{ANY_SHAPE, emulator, half, on_gpus};
use super::program::succeed;
use super::trace::Trace;

#[test]
fn sums_are_normed_and_gelu_is_taken_on_the_way() {
    let Some(emulator) = emulator() else { return };
    let setup = half("lora_train");
    let trace = setup.folder.path().join("trace.jsonl");
    let mut command = on_gpus(&emulator, &setup, &setup.output("run"), "0", ANY_SHAPE);
    command.args(["--recompute", "none"]);
    succeed(command.env("EMULATOR_TRACE", &trace));
    check(&trace);
}

fn check(trace: &Path) {
    let trace = Trace::read(trace);
    let launched = |name: &str| trace.launches(1, |kernel| kernel == name);
    let (micro_batches, heads) = (launched("embed"), launched("cross_entropy"));
    let blocks = trace.launches(1, |kernel| kernel.starts_with("attention_forward"));
    assert!(
        micro_batches > 0 && blocks > micro_batches,
        "nothing to count"
    );

    // A norm of its own has the first block, and the head for its rows; all others come with a sum.
    assert_eq!(launched("layer_norm"), micro_batches + heads);
    assert_eq!(launched("residual_layer_norm"), 2 * blocks - micro_batches);
    assert_eq!(launched("residual"), micro_batches);
    assert_eq!(launched("gelu") + launched("gelu_backward"), 0);
}
