#!/usr/bin/env bash
# Measures loading, conversions, tokenising, micro-batches and checkpoints on this machine, and writes
# docs/measurements/io.json and the tables of it, io.md. Takes some minutes, 4 GB of memory and 2 GB under
# TMPDIR; the machine should have nothing else to do.
#
#     scripts/measure_io.sh [--runs N] [loading|conversions|tokenising|batches|saving ...]
#
# With parts named, or with IO_OUT set, the committed files stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."

parts=
for argument in "$@"; do
  case "$argument" in loading | conversions | tokenising | batches | saving) parts=yes ;; esac
done
out=()
if [ -n "${IO_OUT:-}" ]; then
  out=(--out "$IO_OUT")
elif [ -z "$parts" ]; then
  mkdir -p docs/measurements
  out=(--out "$PWD/docs/measurements/io.json")
fi

changed=
[ -z "$(git status --porcelain --untracked-files=no -- src Cargo.lock tests/bench)" ] || changed=" with changes"
IO_COMMIT="$(git rev-parse HEAD)$changed" \
  IO_DATE=$(date -u +%Y-%m-%d) \
  IO_COMMAND="scripts/measure_io.sh${*:+ $*}" \
  cargo bench --quiet --locked --bench io -- "${out[@]}" "$@"
