#!/usr/bin/env bash
# Makes 1,000,000 short rows in the alpaca form, tokenises them into the cache and finds them there
# again, and says how fast that is and how much memory it takes. With a model folder (config.json,
# weights, ice_text.model) it then trains a LoRA on them for 20 steps:
#
#     scripts/million_rows.sh [model folder] [number of rows]
set -euo pipefail
cd "$(dirname "$0")/.."

model=${1:-}
rows=${2:-1000000}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

awk -v rows="$rows" 'BEGIN {
  split("apples pears nuts 苹果 梨 книги", things, " ")
  for (i = 1; i <= rows; i++) {
    a = i % 977; b = i % 491; thing = things[i % 6 + 1]
    printf "{\"instruction\": \"How many %s are %d and %d?\", \"input\": \"%s\", \"output\": \"Together %d %s.\"}\n", \
      thing, a, b, (i % 3 ? "" : "row " i), a + b, thing
  }
}' > "$work/rows.jsonl"
echo "$rows rows, $(wc -c < "$work/rows.jsonl") bytes"

ROWS_FILE=$work/rows.jsonl cargo test --quiet --release --test cache -- \
  --ignored --exact --nocapture tokenise_the_rows_of_a_file | grep rows

[ -n "$model" ] || exit 0

cat > "$work/run.toml" <<TOML
[model]
path = "$model"
[adapter]
kind = "lora"
[data]
train = "$work/rows.jsonl"
template = "alpaca"
[pipeline]
devices = ["cpu"]
[run]
output = "$work/output"
max_steps = 20
micro_batch_size = 4
TOML

# The largest resident set that a process had so far, as the kernel counts it.
peak() { awk '/^VmHWM:/ { printf "%d MiB", $2 / 1024 }' "/proc/$1/status" 2> /dev/null; }

cargo build --quiet --release
"${CARGO_TARGET_DIR:-target}/release/mp-train" train --config "$work/run.toml" &
run=$!
most=
while now=$(peak "$run") && [ -n "$now" ]; do
  most=$now
  sleep 0.1
done
wait "$run"
echo "20 steps: at most $most resident"
