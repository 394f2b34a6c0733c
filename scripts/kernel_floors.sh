#!/usr/bin/env bash
# What the kernels cost at the least, from their machine code for sm_86 and sm_90: registers, occupancy,
# instructions by class, bytes, and time floors at the shapes of ChatGLM-6B. No GPU is needed.
#
#   NVDISASM=/usr/local/cuda/bin/nvdisasm scripts/kernel_floors.sh
#
# writes docs/measurements/kernel-floors.json and docs/kernel-floors.md. Needs NVRTC 12 where a run would
# find it (MP_TRAIN_CUDA_LIBRARIES) and nvdisasm: of a CUDA toolkit, or of the wheel `triton`
# (triton/backends/nvidia/bin). First brings up to date what it reads: the launches and the traffic
# that tests/kernel_traffic.rs records on an emulated GPU.
set -euo pipefail
cd "$(dirname "$0")/.."

nvdisasm=${NVDISASM:-$(command -v nvdisasm || true)}
[ -n "$nvdisasm" ] || { echo "no nvdisasm: name one with NVDISASM" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

UPDATE_SNAPSHOTS=1 cargo test --locked ${PROFILE---release} --test kernel_traffic
KERNEL_CODE=$work/code cargo test --locked ${PROFILE---release} --test kernel_code machine_code
commit=$(git rev-parse HEAD)
[ -z "$(git status --porcelain --untracked-files=no -- kernels src tests)" ] || commit="$commit with changes"
mkdir -p docs/measurements
python3 scripts/kernel_floors.py "$work/code" "$nvdisasm" "$commit" docs/measurements/kernel-floors.json docs/kernel-floors.md
