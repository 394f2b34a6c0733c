#!/usr/bin/env bash
# Fuzzes the readers of files that other people wrote: so many seconds for each target (300), one process.
#
#     scripts/fuzz.sh [SECONDS] [TARGET ...]       scripts/fuzz.sh 60 torch_bin
#
# Needs `cargo install cargo-fuzz` and a nightly toolchain, or RUSTC_BOOTSTRAP=1 with TOOLCHAIN=stable.
# Seeds come from the tests; what is found is left in tests/fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:-300}
targets=("${@:2}")
if [ ${#targets[@]} -eq 0 ]; then
    targets=(safetensors torch_bin torch_pickle adapter_folder sentencepiece byte_level model_config)
fi
toolchain=${TOOLCHAIN:-nightly}

cp Cargo.lock tests/fuzz/Cargo.lock
FUZZ_CORPUS=$PWD/tests/fuzz/corpus cargo test --locked --test checkpoint seeds_for_fuzzing -- --ignored
for target in "${targets[@]}"; do
    cargo "+$toolchain" fuzz run --fuzz-dir tests/fuzz "$target" -- \
        -max_total_time="$seconds" -timeout=20 -rss_limit_mb=2048 -malloc_limit_mb=512 \
        -max_len=300000 -print_final_stats=1
done
