#!/usr/bin/env bash
# Checks mp-train on a real GPU.
#
#   scripts/check_gpu.sh pack FOLDER               where Rust is: builds, and puts what is needed into FOLDER
#   scripts/check_gpu.sh run FOLDER [RESULTS]      where the GPU is; needs neither Rust nor a network
#
# `run` finds the CUDA libraries (loader path, Python wheels, toolkit), then checks: the tensor-core and
# copy wrappers; every op against its reference, natively and by the code paths of sm_75 and sm_80 (PTX
# that the driver translates); the golden cases; training and answers of the program; memory errors by
# compute-sanitizer where there is one; speed and memory of ChatGLM-6B at full size with made-up
# weights. Results go to RESULTS (gpu-results.json) as JSON, one check per line inside. The last line
# is `N passed, N failed, N skipped`; with MP_TRAIN_REQUIRE_GPU=1 a skip is a failure.
# CHECKS="ops golden" runs some of: wrappers ops ops_75 ops_80 golden train answer stages sanitizer bench.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

pack() {
  set -e
  local folder=$1
  mkdir -p "$folder"
  folder=$(cd "$folder" && pwd)
  cd "$root"
  cargo build --locked --release --bin mp-train
  local target=${CARGO_TARGET_DIR:-$root/target}
  cp "$target/release/mp-train" "$folder/"
  local test path
  for test in kernel_wrappers ops golden; do
    path=$(cargo test --locked --release --test "$test" --no-run 2>&1 | sed -n 's/.*(\(.*\))$/\1/p' | tail -n 1)
    cp "$path" "$folder/$test"
  done
  strip "$folder"/*
  git rev-parse HEAD >"$folder/commit"
  [ -z "$(git status --porcelain --untracked-files=no)" ] || printf '%s with changes\n' "$(cat "$folder/commit")" >"$folder/commit"
  du -sh "$folder"
}

# Folder with the names that the program looks for, linked to what the machine has: wheels of CUDA 13
# have another number in the name.
link_libraries() {
  local links=$1 name file
  for name in libnvrtc libcublasLt; do
    ldconfig -p 2>/dev/null | grep -q "$name\.so\(\.12\)\? " && continue
    for file in $(ls -d /usr/local/cuda*/lib64/"$name".so.[0-9]* \
      /usr/lib/python3*/*-packages/nvidia/*/lib/"$name".so.[0-9]* \
      /usr/local/lib/python3*/*-packages/nvidia/*/lib/"$name".so.[0-9]* \
      "${VIRTUAL_ENV:-/nowhere}"/lib/python3*/site-packages/nvidia/*/lib/"$name".so.[0-9]* 2>/dev/null) \
      $(python3 -c 'import glob, sys; [print(f) for p in sys.path for f in glob.glob(p + "/nvidia/*/lib/'"$name"'.so.[0-9]*")]' 2>/dev/null); do
      ln -sf "$file" "$links/$name.so"
      # What the library opens by its full name lies beside it.
      printf '%s\n' "$(dirname "$file")" >>"$links/.folders"
      break
    done
  done
}

text() { printf '%s' "$1" | tr -d '\000-\037' | sed 's/\\/\\\\/g; s/"/\\"/g'; }

passed=0 failed=0 skipped=0
rows=()

# record NAME passed|failed|skipped SECONDS NOTE [JSON]
record() {
  local result=$2
  if [ "$result" = skipped ] && [ "${MP_TRAIN_REQUIRE_GPU:-}" = 1 ]; then result=failed; fi
  case $result in passed) passed=$((passed + 1)) ;; failed) failed=$((failed + 1)) ;; skipped) skipped=$((skipped + 1)) ;; esac
  rows+=("{\"check\": \"$1\", \"result\": \"$result\", \"seconds\": $3, \"note\": \"$(text "$4")\", \"measured\": ${5:-null}}")
  printf '%-28s %-8s %5s s  %s\n' "$1" "$result" "$3" "$4"
}

wanted() { [ -z "${CHECKS:-}" ] || [[ " $CHECKS " == *" $1 "* ]]; }

# check NAME COMMAND..: passed when the command ends with 0; the note is its last line.
check() {
  local name=$1 began=$SECONDS
  shift
  wanted "$name" || return 0
  if timeout "${LIMIT:-600}" "$@" >"$work/log" 2>&1; then
    record "$name" passed $((SECONDS - began)) "$(grep -E '^test result|passed' "$work/log" | tail -n 1)"
  else
    record "$name" failed $((SECONDS - began)) "$(grep -E 'FAIL|panicked|rror' "$work/log" | head -n 1)"
    tail -n 30 "$work/log"
  fi
}

# measure NAME ARGUMENTS..: a line of `mp-train bench`.
measure() {
  local name=$1 began=$SECONDS line
  shift
  wanted bench || return 0
  if line=$(timeout 550 "$bin/mp-train" bench --json "$@" 2>"$work/log"); then
    record "$name" passed $((SECONDS - began)) "$(printf '%s' "$line" | sed 's/.*"tokens_per_second":\([0-9]*\).*/\1 tokens per second/')" "$line"
  else
    record "$name" failed $((SECONDS - began)) "$(head -n 1 "$work/log")"
  fi
}

# The golden LoRA run on the GPU and on the CPU, both in f16: final losses within 0.05.
train() {
  local on
  cd "$root" || return 1
  for on in 0 cpu; do
    "$bin/mp-train" --config configs/lora-golden.toml --devices "$on" --precision f16 --rotary-table f32 \
      --output "$work/train-$on" --quiet || return 1
  done
  paste -d ' ' <(losses "$work/train-0") <(losses "$work/train-cpu") |
    awk '{ d = $1 - $2; if (d < 0) d = -d; if (!(d <= 0.05)) { print "FAIL step " NR ": " $1 " on the GPU, " $2 " on the CPU"; bad = 1 } n++ }
      END { if (bad || n == 0) exit 1; print n " steps within 0.05: passed" }'
}

# The golden LoRA run as two and three stages on one GPU by peer copies, by NCCL where it lets ranks share
# a GPU, interleaved, and on all GPUs there are: the bits of one stage.
stages() {
  local on=0 gpus all run=0
  cd "$root" || return 1
  staged() {
    run=$((run + 1))
    "$bin/mp-train" --config configs/lora-golden.toml --precision f16 --rotary-table f32 --quiet \
      --stall-timeout 60 --output "$work/stages-$run" "$@" || return 1
    cmp "$work/stages-1/adapter/adapter_model.safetensors" "$work/stages-$run/adapter/adapter_model.safetensors" || return 1
    cmp <(losses "$work/stages-1") <(losses "$work/stages-$run") || return 1
  }
  staged --devices 0 && staged --devices 0,0 && staged --devices 0,0,0 &&
    staged --devices 0,0 --schedule interleaved || return 1
  gpus=$("$bin/mp-train" devices | grep -c '^[0-9]\+:')
  if [ "$gpus" -gt 1 ]; then
    all=$(seq -s , 0 $((gpus > 4 ? 3 : gpus - 1)))
    staged --devices "$all" --transport p2p && staged --devices "$all" --transport nccl || return 1
  fi
  if [ "${NCCL_MULTI_RANK_GPU_ENABLE:-}" = 1 ]; then
    staged --devices 0,0 --transport nccl && staged --devices 0,0,0 --transport nccl || return 1
  fi
  echo "$run runs, the same bits: passed"
}

losses() { sed -n 's/.*"loss":\([-0-9.e+NaN]*\).*/\1/p' "$1/metrics.jsonl"; }

# Greedy answers to two prompts (they end with the model's gMASK and sop), on the GPU and on the CPU.
answer() {
  local on
  cd "$root" || return 1
  printf '{"input_ids": [5, 6, 7, 8, 9, 10, 191, 194]}\n{"input_ids": [11, 12, 13, 191, 194]}\n' >"$work/prompts.jsonl"
  for on in 0 cpu; do
    "$bin/mp-train" generate --model tests/golden/chatglm-6b/model --devices "$on" --precision f16 \
      --rotary-table f32 --max-new-tokens 16 --input "$work/prompts.jsonl" --output "$work/answers-$on" || return 1
  done
  cmp "$work/answers-0" "$work/answers-cpu" && echo "answers are the same: passed"
}

run() {
  bin=$(cd "$1" && pwd)
  local results=${2:-$PWD/gpu-results.json} device driver
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  mkdir "$work/links"
  link_libraries "$work/links"
  LD_LIBRARY_PATH="$work/links:$(sort -u "$work/links/.folders" 2>/dev/null | paste -sd: -):${LD_LIBRARY_PATH:-}"
  export LD_LIBRARY_PATH MP_TRAIN_KERNEL_CACHE=$work/kernels MP_TRAIN_TEST_GPU=1
  local golden=$root/tests/golden
  export GOLDEN_DIR=$golden/chatglm-6b:$golden/chatglm2-6b:$golden/glm-4-9b GOLDEN_BACKEND=cuda
  device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1)
  if [ -z "$device" ]; then
    record gpu skipped 0 "nvidia-smi shows no GPU"
  else
    "$bin/mp-train" devices
    check wrappers "$bin/kernel_wrappers" --nocapture
    check ops "$bin/ops" --exact cuda_on_this_gpu --nocapture
    MP_TRAIN_KERNEL_ARCH=75 check ops_75 "$bin/ops" --exact cuda_on_this_gpu --nocapture
    MP_TRAIN_KERNEL_ARCH=80 check ops_80 "$bin/ops" --exact cuda_on_this_gpu --nocapture
    check golden "$bin/golden" --exact golden_cuda --nocapture
    check train "$root/scripts/check_gpu.sh" step train "$bin" "$work"
    check answer "$root/scripts/check_gpu.sh" step answer "$bin" "$work"
    check stages "$root/scripts/check_gpu.sh" step stages "$bin" "$work"
    if command -v compute-sanitizer >/dev/null; then
      LIMIT=900 check sanitizer compute-sanitizer --error-exitcode 9 "$bin/mp-train" --config "$root/configs/lora-golden.toml" \
        --devices 0 --precision f16 --max-steps 3 --output "$work/sanitized" --quiet
    elif wanted sanitizer; then
      record sanitizer skipped 0 "compute-sanitizer is not installed"
    fi
    measure bench_tiny --size tiny --sequence-length 128 --gradient-accumulation 2
    measure bench_lora_1x512_block --size chatglm-6b --sequence-length 512 --recompute block
    measure bench_lora_1x512 --size chatglm-6b --sequence-length 512
    measure bench_lora_4x1024 --size chatglm-6b --micro-batch-size 4 --sequence-length 1024
    measure bench_prefix_int4_1x128 --size chatglm-6b --adapter prefix --quantization int4 --sequence-length 128
    measure bench_lora_int4_1x512 --size chatglm-6b --quantization int4 --sequence-length 512
    measure bench_two_stages --size chatglm-6b --devices 0,0 --sequence-length 512 --recompute block
    measure bench_prefix_1x512 --size chatglm-6b --adapter prefix --sequence-length 512
    measure bench_chatglm2_lora_4x1024 --size chatglm2-6b --micro-batch-size 4 --sequence-length 1024 --recompute block
    measure bench_glm4_lora_1x512 --size glm-4-9b --sequence-length 512 --recompute block
  fi
  {
    printf '{\n "device": "%s",\n "driver": "%s",\n "commit": "%s",\n "date": "%s",\n "passed": %d,\n "failed": %d,\n "skipped": %d,\n "checks": [\n' \
      "$(text "$device")" "$(text "$driver")" "$(text "$(cat "$bin/commit" 2>/dev/null)")" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$passed" "$failed" "$skipped"
    local index
    for index in "${!rows[@]}"; do
      printf '  %s%s\n' "${rows[$index]}" "$([ "$index" -lt $((${#rows[@]} - 1)) ] && printf ',')"
    done
    printf ' ]\n}\n'
  } >"$results"
  printf 'results in %s\n%d passed, %d failed, %d skipped\n' "$results" "$passed" "$failed" "$skipped"
  [ "$failed" -eq 0 ]
}

# `check` runs commands under `timeout`, which needs programs: our own steps come back here.
if [ "${1:-}" = step ]; then
  bin=$3 work=$4
  "$2"
  exit
fi
case "${1:-}" in
pack) pack "${2:?a folder}" ;;
run) run "${2:?the folder that pack filled}" "${3:-}" ;;
*) sed -n '2,16s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
