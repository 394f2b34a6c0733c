#!/usr/bin/env bash
# Tokens per second, memory and bubble for every number of devices, with made-up weights of a named size.
#
#     scripts/bench.sh [OPTIONS OF mp-train bench]         scripts/bench.sh --size small --steps 10
#
# Measures 1, 2, .. of the GPUs that `mp-train devices` lists, or of as many CPU stages as STAGES says where
# there is none. DEVICES="0 1 3" names other GPUs, BINARY another program, RESULTS the file that gets one
# line of JSON per measurement (target/bench.jsonl). A count that fails (out of memory, say) is shown with
# its reason, and the others are measured; the exit status is then 1.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${BINARY:-}" ]; then
  cargo build --locked --release --quiet
  BINARY=${CARGO_TARGET_DIR:-target}/release/mp-train
fi
results=${RESULTS:-target/bench.jsonl}
mkdir -p "$(dirname "$results")"
: >"$results"

if [ -z "${DEVICES:-}" ]; then
  # Lines of GPUs begin with their number.
  DEVICES=$("$BINARY" devices | grep -o '^[0-9]\+:' | tr -d ':' || true)
fi
if [ -z "$DEVICES" ]; then
  for ((stage = 0; stage < ${STAGES:-2}; stage++)); do DEVICES+=" cpu"; done
fi

# field NAME LINE: a number of a line of JSON.
field() { grep -o "\"$1\":[^,}]*" <<<"$2" | head -n 1 | cut -d : -f 2; }
# gib NAME LINE: the largest of the devices' bytes of that name, in GiB.
gib() {
  grep -o "\"$1\":[0-9]*" <<<"$2" | cut -d : -f 2 |
    awk 'BEGIN { most = -1 } { if ($1 > most) most = $1 } END { if (most < 0) print "-"; else printf "%.2f", most / 2^30 }'
}

printf '%-9s %10s %9s %9s %13s %13s\n' devices tokens/s 'of ideal' 'bubble %' 'planned GiB' 'in use GiB'
alone='' so_far='' failed=0
for device in $DEVICES; do
  so_far+=${so_far:+,}$device
  log=$(mktemp)
  if ! line=$("$BINARY" bench --json --devices "$so_far" "$@" 2>"$log"); then
    failed=1
    printf '%-9s %s\n' "$so_far" "$(grep -m 1 '^error' "$log" || tail -n 1 "$log")"
    rm -f "$log"
    continue
  fi
  rm -f "$log"
  printf '%s\n' "$line" >>"$results"
  rate=$(field tokens_per_second "$line")
  count=$(($(tr -cd , <<<"$so_far" | wc -c) + 1))
  alone=${alone:-$(awk -v rate="$rate" -v count="$count" 'BEGIN { print rate / count }')}
  awk -v devices="$so_far" -v rate="$rate" -v alone="$alone" -v count="$count" \
    -v idle="$(field planned_idle "$line")" -v planned="$(gib planned_bytes "$line")" \
    -v used="$(gib used_bytes "$line")" \
    'BEGIN { printf "%-9s %10.1f %9.2f %9.1f %13s %13s\n", devices, rate, rate / (alone * count), 100 * idle, planned, used }'
done
echo "bubble: idle share of the schedule; of ideal: tokens/s over those of the smallest count that ran, times the devices"
echo "each measurement as JSON: $results"
exit $failed
