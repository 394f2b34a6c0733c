#!/usr/bin/env bash
# Kernels on emulated GPUs under the address, undefined-behaviour and thread sanitizers: every op case on
# sm_75 and sm_80 (newer ones take the paths of sm_80), then the proof that the sanitizers see what is
# planted, then all planted bugs. The test binary is the one of `cargo test`: only kernels are compiled
# with sanitizers, whose libraries are loaded before it. Needs g++ with libasan, libubsan and libtsan.
set -euo pipefail
cd "$(dirname "$0")/.."

root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MP_TRAIN_REQUIRE_EMULATOR=1

library() {
  local path
  path=$(g++ -print-file-name="$1.so")
  [ "$path" != "$1.so" ] || { echo "$1.so is missing: install g++ with its sanitizers" >&2; exit 1; }
  echo "$path"
}
address="$(library libasan) $(library libubsan)"
thread=$(library libtsan)
# The thread sanitizer wants its addresses free of randomisation, where that can be had.
fixed=
setarch -R true 2>/dev/null && fixed="setarch -R"

cargo test --locked --release --test ops --no-run >"$work/build" 2>&1 || { tail -n 40 "$work/build" >&2; exit 1; }
ops=$(sed -n 's/.*Executable.*(\(.*\))$/\1/p' "$work/build")
# Builds the pretend libraries, which the sanitizers are no part of.
OPS_EMULATED_ARCH=80 OPS_FAMILIES=memory "$ops" --exact cuda_emulated >"$work/built" 2>&1 || { tail -n 40 "$work/built"; exit 1; }

# run SANITIZER ARCH LOG: the op cases; fails on a report.
run() {
  local log=$3
  if [ "$1" = address ]; then
    EMULATOR_SANITIZE=address OPS_EMULATED_ARCH=$2 LD_PRELOAD=$address ASAN_OPTIONS=detect_leaks=0 \
      "$ops" --exact cuda_emulated --nocapture >"$log" 2>&1
  else
    # Whatever is not a kernel is not instrumented, and its calls are none of the sanitizer's business.
    EMULATOR_SANITIZE=thread OPS_EMULATED_ARCH=$2 LD_PRELOAD=$thread \
      TSAN_OPTIONS=ignore_noninstrumented_modules=1:report_signal_unsafe=0:exitcode=66 \
      $fixed "$ops" --exact cuda_emulated --nocapture >"$log" 2>&1
  fi
}

clean() {
  local log=$work/$1-$2
  if run "$1" "$2" "$log"; then
    printf '%-8s sm_%s  clean\n' "$1" "$2"
  else
    printf '%-8s sm_%s  FAILED\n' "$1" "$2"
    grep -m 1 -A 30 -E 'ERROR: AddressSanitizer|runtime error|WARNING: ThreadSanitizer' "$log" || tail -n 30 "$log"
    return 1
  fi
}

# sees SANITIZER BUG: a planted bug that this sanitizer must report.
sees() {
  local tree=$work/$1-$2
  mkdir "$tree"
  cp -r kernels "$tree/kernels"
  (cd "$tree" && git apply "$root/tests/kernel_bugs/$2.patch")
  MP_TRAIN_KERNEL_SOURCES=$tree/kernels OPS_FAMILIES=$(sed -n '1s/^family: //p' "tests/kernel_bugs/$2.patch") \
    run "$1" 80 "$tree/log" || true
  if grep -q -E 'ERROR: AddressSanitizer|runtime error|WARNING: ThreadSanitizer' "$tree/log"; then
    printf '%-8s sees %s: %s\n' "$1" "$2" "$(grep -m 1 -E '^SUMMARY|runtime error' "$tree/log" | sed 's/^SUMMARY: //' | cut -c 1-140)"
  else
    printf '%-8s DOES NOT SEE %s\n' "$1" "$2"
    tail -n 20 "$tree/log"
    return 1
  fi
}

failed=0
# Two at a time.
pair() {
  "$1" "$2" "$3" &
  local first=$!
  "$1" "$4" "$5" || failed=1
  wait "$first" || failed=1
}
pair clean address 75 address 80
pair clean thread 75 thread 80
pair sees address vector_access_off_its_border address reduction_uninitialised
pair sees thread attention_missing_barrier thread embedding_blocks_race
pair sees thread reduction_missing_barrier thread attention_keys_not_awaited
bash scripts/check_kernel_bugs.sh || failed=1
exit "$failed"
