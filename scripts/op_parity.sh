#!/usr/bin/env bash
# Writes docs/op-parity.md: the largest error of every op on every backend, from the op cases.
set -euo pipefail
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
MP_TRAIN_REQUIRE_EMULATOR=1 cargo test --locked --release --test ops -- --nocapture >"$log" 2>/dev/null
{
  cat <<'END'
# The op cases on every backend

Largest error of each op over all its cases against f64 loops, in f32 epsilons of the magnitude of the terms
that went into a value, beyond one rounding to the storage type; in brackets what is allowed. Lines with
`difference`: a gradient against central differences, as a share of it (`f64`: of the f64 loops; `own`: of
the op itself, where it stores f32). `sm_..` is the CUDA backend on an emulated GPU of that generation;
three orders of threads and blocks give the same bits there. Attention on tensor cores rounds to half inside,
which is allowed for (NUMERICS.md). Written by

    bash scripts/op_parity.sh

END
  awk '
    / (ok|FAIL)$/ && NF >= 6 {
      backend = $2
      for (i = 3; i <= NF - 4; i++) backend = backend " " $i
      sub(/^cuda on /, "", backend)
      if (!(backend in seen)) { seen[backend] = 1; backends[++count] = backend }
      if (!($1 in place)) { place[$1] = ++ops; name[ops] = $1 }
      cell[$1, backend] = sprintf("%.2g (%g)", $(NF - 2), $(NF - 1)) ($NF == "FAIL" ? " FAIL" : "")
    }
    END {
      # The threads of the tests decide which backend speaks first; the page does not change with that.
      for (i = 1; i <= count; i++) for (j = i + 1; j <= count; j++) if (backends[j] < backends[i]) { t = backends[i]; backends[i] = backends[j]; backends[j] = t }
      printf "| op |"; for (b = 1; b <= count; b++) printf " %s |", backends[b]; print ""
      printf "| --- |"; for (b = 1; b <= count; b++) printf " --- |"; print ""
      for (o = 1; o <= ops; o++) { order[o] = name[o] }
      for (i = 1; i <= ops; i++) for (j = i + 1; j <= ops; j++) if (order[j] < order[i]) { t = order[i]; order[i] = order[j]; order[j] = t }
      for (o = 1; o <= ops; o++) {
        printf "| %s |", order[o]
        for (b = 1; b <= count; b++) printf " %s |", ((order[o], backends[b]) in cell) ? cell[order[o], backends[b]] : ""
        print ""
      }
    }' "$log"
} >docs/op-parity.md
