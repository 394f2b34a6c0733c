#!/usr/bin/env bash
# The memory that is planned for three runs of ChatGLM-6B on one GPU, beside the limits that are asked for: in
# GB of 10^9 bytes, all blocks recomputed, vocabulary 130,528, head and embedding one matrix; context and
# libraries included, as the plan estimates them.
#
#   scripts/memory_limits.sh              writes docs/measurements/planned-memory.json
#
# BINARY names a program that is built. Exits with 1 where a plan is above its limit. What a GPU really takes,
# scripts/check_gpu.sh measures (CHECKS=speed_memory).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${BINARY:-}" ]; then
  cargo build --locked --release --quiet
  BINARY=${CARGO_TARGET_DIR:-target}/release/mp-train
fi
commit=$(git rev-parse HEAD)
[ -z "$(git status --porcelain --untracked-files=no -- src)" ] || commit="$commit with changes"

rows=() failed=0
# case_of LIMIT NAME OPTIONS..
case_of() {
  local limit=$1 name=$2 planned
  shift 2
  # The line of stage 0 ends in the bytes of all together and what is left of the device.
  planned=$("$BINARY" plan --size chatglm-6b --devices 0 --memory-per-device 24GB --precision f16 --recompute block "$@" |
    awk '$1 == "0" && /block/ { print $(NF - 1); exit }')
  [ -n "$planned" ] || { echo "no plan for $name" >&2; exit 1; }
  if awk -v planned="$planned" -v limit="$limit" 'BEGIN { exit planned <= limit }'; then failed=1; fi
  rows+=("{\"run\": \"$name\", \"options\": \"$*\", \"planned_gb\": $planned, \"limit_gb\": $limit}")
  printf '%-28s planned %6s GB, limit %6s GB\n' "$name" "$planned" "$limit"
}
case_of 13.5 "LoRA, 1 x 512" --sequence-length 512 --micro-batch-size 1
case_of 16.5 "LoRA, 4 x 1024" --sequence-length 1024 --micro-batch-size 4
case_of 5.5 "P-Tuning, int4, 1 x (64 + 64)" --kind prefix --pre-seq-len 128 --quantization int4 --sequence-length 128 --micro-batch-size 1

mkdir -p docs/measurements
{
  printf '{\n "made_by": "scripts/memory_limits.sh",\n "commit": "%s",\n "runs": [\n' "$commit"
  printf '  %s' "${rows[0]}"
  printf ',\n  %s' "${rows[@]:1}"
  printf '\n ]\n}\n'
} >docs/measurements/planned-memory.json
exit "$failed"
