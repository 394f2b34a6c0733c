#!/usr/bin/env bash
# Proves that the golden test notices wrong numerics, in f32 and under the wider limits of f16, on the CPU
# and on an emulated GPU: it must pass on the tree as it is, and fail with each fault of tests/planted/
# planted into a copy of it, on the backends that the fault's first line names, with the family of models
# that its second line names. The faults of
# tests/planted_kernels/ are planted into a copy of the kernels, which the build then reads. One line per
# fault and backend, with the cases that caught it. The copies stand in the target folder, so that
# dependencies are built once for all.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
mkdir -p "$target/planted"
target=$(cd "$target" && pwd)
tree=$target/planted/tree
kernels=$target/planted/kernels
log=$target/planted/log
export CARGO_TARGET_DIR=$target
# Inside the copies, git must not find the repository around them.
export GIT_CEILING_DIRECTORIES=$target/planted

# An emulated GPU is slow: these cases are enough to see every fault that it is to see.
declare -A cases_on_cuda=(
  [chatglm-6b]=forward_gmask,lora_qkv [chatglm2-6b]=forward,lora_qkv [glm-4-9b]=forward,lora_attn
)

# The crate is built once per fault and runs briefly: what builds quickly is quick.
export CARGO_INCREMENTAL=1
cargo=(cargo --config 'profile.release.package.mp-train.opt-level=1'
  --config 'profile.release.package.mp-train.debug=false')

backends="cpu-f32 cpu-f16 cuda"
if [ "${MP_TRAIN_TEST_GPU:-}" != 1 ] && ! command -v "${EMULATOR_CXX:-g++}" >/dev/null; then
  if [ "${MP_TRAIN_REQUIRE_EMULATOR:-}" = 1 ]; then
    echo "MP_TRAIN_REQUIRE_EMULATOR=1, and there is no g++" >&2
    exit 1
  fi
  echo "cuda: skipped: needs g++"
  backends="cpu-f32 cpu-f16"
fi

# New times for the files, or cargo would take an older build for theirs.
copy() {
  rm -rf "$tree"
  mkdir "$tree"
  git ls-files -z | tar --null --files-from=- --create --file=- | tar --extract --touch --file=- -C "$tree"
}

in_tree() { (cd "$tree" && "$@"); }

fail() {
  printf '%s\n' "$1" >&2
  tail -n 40 "$log" >&2
  exit 1
}

build() {
  in_tree "${cargo[@]}" test --locked --release --test golden --no-run >"$log" 2>&1 ||
    fail "$1: does not compile"
}

# 0 when the golden test of a family passes on a backend, 1 when it fails.
golden() {
  local settings=(GOLDEN_BACKEND="$1" GOLDEN_DIR="$tree/tests/golden/$2")
  if [ "$1" = cuda ]; then
    settings+=(GOLDEN_CASES="${cases_on_cuda[$2]}")
  fi
  in_tree env "${settings[@]}" "${cargo[@]}" test --locked --release --test golden -- golden_ >"$log" 2>&1
}

# Cases that compared and found a difference; one that ended with an error has compared nothing.
caught_by() { sed -n 's/^\([a-z0-9_]*\)\/.* FAIL .*/\1/p' "$log" | sort -u | tr '\n' ' '; }

# The golden test must fail on a backend, with a verdict: a run that ends without one (a crash, a kill)
# has caught nothing.
missed=0
must_catch() {
  local fault=$1 backend=$2 family=$3 cases
  if golden "$backend" "$family"; then
    printf '%-26s %-8s NOT CAUGHT\n' "$fault" "$backend"
    missed=1
    return
  fi
  cases=$(caught_by)
  if [ -z "$cases" ] || ! grep -q "^test golden_${backend//-/_}\(_f16_sums\)\? .*FAILED" "$log"; then
    fail "$fault on $backend: no verdict"
  fi
  printf '%-26s %-8s caught by %s\n' "$fault" "$backend" "$cases"
}

# The backends on which a fault must be caught, out of those that there are here.
backends_of() {
  local named backend
  named=$(sed -n '1s/^Caught on: //p' "$1")
  [ -n "$named" ] || fail "$1: its first line does not say on which backends it is caught"
  for backend in $backends; do
    case " $named " in *" $backend "*) echo "$backend" ;; esac
  done
}

# The family whose cases catch it.
family_of() {
  local family
  family=$(sed -n '2s/^Family: //p' "$1")
  [ -d "tests/golden/$family" ] || fail "$1: its second line does not name a family of tests/golden"
  echo "$family"
}

copy
build "without a fault"
for backend in $backends; do
  for family in $(sed -sn '2s/^Family: //p' tests/planted/*.patch | sort -u); do
    golden "$backend" "$family" || fail "without a fault: the golden test of $family fails on $backend"
    printf '%-26s %-8s passes with %s\n' "without a fault" "$backend" "$family"
  done
done

# These before the others, while the build is the one without a fault.
for patch in "$PWD"/tests/planted_kernels/*.patch; do
  fault=$(basename "$patch" .patch)
  rm -rf "$kernels"
  mkdir "$kernels"
  cp -R "$tree/kernels" "$kernels"
  on=$(backends_of "$patch")
  (cd "$kernels" && git apply "$patch") || fail "$fault: the patch no longer applies; bring it up to date"
  for backend in $on; do
    MP_TRAIN_KERNEL_SOURCES=$kernels/kernels must_catch "$fault (kernel)" "$backend" "$(family_of "$patch")"
  done
done

for patch in "$PWD"/tests/planted/*.patch; do
  fault=$(basename "$patch" .patch)
  in_tree git apply "$patch" || fail "$fault: the patch no longer applies; bring it up to date"
  build "$fault"
  on=$(backends_of "$patch")
  for backend in $on; do
    must_catch "$fault" "$backend" "$(family_of "$patch")"
  done
  in_tree git apply --reverse "$patch"
done
exit "$missed"
