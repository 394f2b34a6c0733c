#!/usr/bin/env bash
# `mp-train bench` over every layout of this machine's devices, with made-up weights of a named size.
#
#     scripts/bench.sh [OPTIONS OF mp-train bench]         scripts/bench.sh --size small --steps 10
#
# Measures 1, 2, .. of the GPUs that `mp-train devices` lists, or of as many CPU stages as STAGES says where
# there is none (2), with every schedule; prints tables, and writes one JSON document (its schema:
# tests/bench/schema.json) with the commit of this tree into the file RESULTS (target/bench.json).
# DEVICES="0 1 3" names other devices, BINARY another program. QUICK=1 is for CI: a tiny model, few steps.
# A layout that cannot be measured is shown with its reason, and the others are measured; the exit status is
# then that of `mp-train bench`, 1 or 2.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."

if [ -z "${BINARY:-}" ]; then
  cargo build --locked --release --quiet
  BINARY=${CARGO_TARGET_DIR:-target}/release/mp-train
fi
results=${RESULTS:-target/bench.json}
[ "${results#/}" != "$results" ] || [ -z "${RESULTS:-}" ] || results=$here/$results
mkdir -p "$(dirname "$results")"

if [ -z "${DEVICES:-}" ]; then
  # Lines of GPUs begin with their number.
  DEVICES=$("$BINARY" devices | grep -o '^[0-9]\+:' | tr -d ':' || true)
fi
if [ -z "$DEVICES" ]; then
  for ((stage = 0; stage < ${STAGES:-2}; stage++)); do DEVICES+=" cpu"; done
fi
devices=$(xargs <<<"$DEVICES" | tr ' ' ,)

options=()
if [ "${QUICK:-}" = 1 ]; then
  options+=(--size tiny --sequence-length 17 --gradient-accumulation 4 --warm-up 1 --steps 2 --profile-steps 1)
fi
if commit=$(git rev-parse HEAD 2>/dev/null); then
  [ -z "$(git status --porcelain --untracked-files=no)" ] || commit+=" with changes"
  options+=(--commit "$commit")
fi
rm -f "$results"
status=0
"$BINARY" bench --layouts auto --devices "$devices" --output "$results" "${options[@]}" "$@" || status=$?
[ ! -s "$results" ] || echo "as JSON: $results"
exit $status
