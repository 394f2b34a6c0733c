#!/usr/bin/env bash
# Proves that the golden test notices wrong numerics: it must pass on the tree as it is, and fail with
# each fault of tests/planted/ planted into a copy of it. One line per fault, with the cases that caught
# it. The copy stands in the target folder, so that dependencies are built once for all.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${CARGO_TARGET_DIR:-$PWD/target}
mkdir -p "$target/planted"
target=$(cd "$target" && pwd)
tree=$target/planted/tree
log=$target/planted/log
export CARGO_TARGET_DIR=$target
# Inside the copy, git must not find the repository around it.
export GIT_CEILING_DIRECTORIES=$target/planted

# The crate is built once per fault and runs briefly: what builds quickly is quick.
export CARGO_INCREMENTAL=1
cargo=(cargo --config 'profile.release.package.mp-train.opt-level=1'
  --config 'profile.release.package.mp-train.debug=false')

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

# 0 when the golden test passes, 1 when it fails; a build that fails ends the script.
golden() {
  in_tree "${cargo[@]}" test --locked --release --test golden --no-run >"$log" 2>&1 ||
    fail "$1: does not compile"
  in_tree "${cargo[@]}" test --locked --release --test golden -- --exact golden >"$log" 2>&1
}

caught_by() { sed -n 's/^\([a-z0-9_]*\)[/ ].* FAIL .*/\1/p' "$log" | sort -u | tr '\n' ' '; }

copy
golden "without a fault" || fail "without a fault: the golden test fails"
printf '%-24s passes\n' "without a fault"

missed=0
for patch in "$PWD"/tests/planted/*.patch; do
  fault=$(basename "$patch" .patch)
  in_tree git apply "$patch" || fail "$fault: the patch no longer applies; bring it up to date"
  if golden "$fault"; then
    printf '%-24s NOT CAUGHT\n' "$fault"
    missed=1
  else
    cases=$(caught_by)
    # A run that ends without a verdict (a crash, a kill) has caught nothing.
    if [ -z "$cases" ] || ! grep -q '^test golden .*FAILED' "$log"; then
      fail "$fault: no verdict"
    fi
    printf '%-24s caught by %s\n' "$fault" "$cases"
  fi
  in_tree git apply --reverse "$patch"
done
exit "$missed"
