#!/usr/bin/env bash
# Proves that the op cases on emulated GPUs notice bugs in kernels: each patch of tests/kernel_bugs/ is
# applied to a copy of kernels/, and the cases of the family that its first line names must fail on it.
# Nothing but kernels is compiled. EMULATED=75 takes another generation than sm_80.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cargo test --locked --release --test ops --no-run >"$work/build" 2>&1 || { tail -n 40 "$work/build" >&2; exit 1; }
ops=$(sed -n 's/.*Executable.*(\(.*\))$/\1/p' "$work/build")
export MP_TRAIN_REQUIRE_EMULATOR=1 OPS_EMULATED_ARCH=${EMULATED:-80}

# find NAME: applies the patch, runs the family, says by what it was found; 1 when it was not.
find() {
  local name=$1 tree=$work/$1 family found
  family=$(sed -n '1s/^family: //p' "tests/kernel_bugs/$name.patch")
  mkdir "$tree"
  cp -r kernels "$tree/kernels"
  (cd "$tree" && git apply "$root/tests/kernel_bugs/$name.patch") ||
    { printf '%-32s the patch no longer applies; bring it up to date\n' "$name"; return 1; }
  if MP_TRAIN_KERNEL_SOURCES=$tree/kernels OPS_FAMILIES=$family \
    timeout 300 "$ops" --exact cuda_emulated --nocapture >"$tree/log" 2>&1; then
    printf '%-32s NOT FOUND\n' "$name"
    return 1
  fi
  # A run that ends without a verdict, or a kernel that does not compile, has found nothing.
  if ! grep -q 'FAIL' "$tree/log" || grep -q 'does not compile' "$tree/log"; then
    printf '%-32s no verdict\n' "$name"
    tail -n 20 "$tree/log"
    return 1
  fi
  found=$(grep -m 1 -E 'emulat|refused|error of the launch|is not bit-equal|, exact is|guard|was written|panicked' "$tree/log" || true)
  printf '%-32s found: %s\n' "$name" "$(printf '%s' "$found" | sed 's/^ *//' | cut -c 1-120)"
}

names=()
for patch in tests/kernel_bugs/*.patch; do names+=("$(basename "$patch" .patch)"); done
[ "$#" -eq 0 ] || names=("$@")
failed=0
# Two at a time.
for ((i = 0; i < ${#names[@]}; i += 2)); do
  jobs=()
  for name in "${names[@]:i:2}"; do
    find "$name" &
    jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
done
exit "$failed"
