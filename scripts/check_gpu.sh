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
# weights; `speed`: every op beside the rates of products and copies measured in the same run, attention
# beside PyTorch's where torch can be imported, MFU, several stages on one card, the rise of used memory, and
# the PyTorch peers, each held against what the project asks for. Results go to RESULTS (gpu-results.json)
# as JSON, one check per line inside. The last line
# is `N passed, N failed, N skipped`; with MP_TRAIN_REQUIRE_GPU=1 a skip is a failure.
# CHECKS="ops golden" runs some of: wrappers ops ops_75 ops_80 golden golden_f16_sums train train_f16_sums answer stages
# sanitizer bench speed, and of speed speed_ops speed_attention speed_mfu speed_stages speed_memory speed_peers. Each ends
# within nine minutes or is cut. PYTHON names the Python that has torch (python3). To see that it goes on an
# emulated GPU: SPEED_SIZE=tiny SPEED_LENGTH=64 OP_SPEED_SIZES=tiny.
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
  for test in kernel_wrappers ops golden op_speed; do
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

# The golden LoRA run on the GPU and on the CPU, both in f16: losses within 0.05. What follows are flags for the GPU.
train() {
  local on more
  cd "$root" || return 1
  for on in 0 cpu; do
    more=("$@")
    [ "$on" != cpu ] || more=()
    rm -rf "$work/train-$on"
    "$bin/mp-train" --config configs/lora-golden.toml --devices "$on" --precision f16 --rotary-table f32 \
      --output "$work/train-$on" --quiet "${more[@]}" || return 1
  done
  paste -d ' ' <(losses "$work/train-0") <(losses "$work/train-cpu") |
    awk '{ d = $1 - $2; if (d < 0) d = -d; if (!(d <= 0.05)) { print "FAIL step " NR ": " $1 " on the GPU, " $2 " on the CPU"; bad = 1 } n++ }
      END { if (bad || n == 0) exit 1; print n " steps within 0.05: passed" }'
}

# The same with products summed in f16, which change the losses.
train_f16_sums() {
  train --product-sums f16 || return 1
  "$bin/mp-train" --config "$root/configs/lora-golden.toml" --devices 0 --precision f16 --rotary-table f32 \
    --output "$work/train-single" --quiet || return 1
  ! cmp -s <(losses "$work/train-0") <(losses "$work/train-single") || { echo "FAIL: --product-sums f16 changes nothing" && return 1; }
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

# Whether a part of `speed` is wanted.
speed() { wanted speed || wanted "$1"; }

# judge NAME SECONDS ARGUMENTS..: records what scripts/gpu_speed.py makes of a measurement.
judge() {
  local name=$1 seconds=$2 lines
  shift 2
  if lines=$("$python" "$root/scripts/gpu_speed.py" "$@" 2>"$work/log"); then
    record "$name" passed "$seconds" "$(head -n 1 <<<"$lines")" "$(tail -n 1 <<<"$lines")"
  else
    record "$name" failed "$seconds" "$(tail -n 1 "$work/log")"
  fi
}

# bench_into FILE LENGTH OPTIONS..: `mp-train bench` of the model that is asked about, or of a smaller one to
# see that it goes.
bench_into() {
  local file=$1 length=${SPEED_LENGTH:-$2}
  shift 2
  timeout 170 "$bin/mp-train" bench --json --size "${SPEED_SIZE:-chatglm-6b}" --sequence-length "$length" --profile-steps 0 \
    --steps 5 "$@" >"$file" 2>"$work/log"
}

# MiB of the first GPU in use by all processes.
used_memory() { nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits -i 0; }

# memory_rise NAME LIMIT LENGTH OPTIONS..: the most that used memory rises by in a few steps, read five times a second.
memory_rise() {
  local name=$1 limit=$2 began=$SECONDS before reader status=0
  shift 2
  before=$(used_memory)
  (while :; do used_memory && sleep 0.2; done) >"$work/used" &
  reader=$!
  bench_into "$work/$name.json" "$@" --gradient-accumulation 1 --warm-up 1 --recompute block || status=$?
  kill "$reader"
  wait "$reader" 2>/dev/null
  if [ "$status" -ne 0 ]; then
    record "$name" failed $((SECONDS - began)) "$(grep -m 1 -E '^error' "$work/log" || tail -n 1 "$work/log")"
  else
    judge "$name" $((SECONDS - began)) memory "$limit" "$before" "$(sort -n "$work/used" | tail -n 1)" "$work/$name.json"
  fi
}

speed_checks() {
  local began file failed_one
  python=${PYTHON:-python3}
  if (speed speed_ops || speed speed_attention); then
    began=$SECONDS
    if OP_SPEED_RESULTS=$work/ops.json timeout 300 "$bin/op_speed" --exact on_this_gpu --nocapture >"$work/log" 2>&1; then
      judge speed_ops $((SECONDS - began)) ops "$work/ops.json"
    else
      record speed_ops failed $((SECONDS - began)) "$(grep -m 1 -E 'panicked|rror' "$work/log")"
    fi
  fi
  if speed speed_attention; then
    began=$SECONDS
    if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
      record speed_attention skipped 0 "$python has no torch with CUDA: name another with PYTHON"
    elif timeout 220 "$python" "$root/scripts/peers/attention.py" --output "$work/sdpa.json" >"$work/log" 2>&1; then
      judge speed_attention $((SECONDS - began)) attention "$work/ops.json" "$work/sdpa.json"
    else
      record speed_attention failed $((SECONDS - began)) "$(tail -n 1 "$work/log")"
    fi
  fi
  if speed speed_mfu; then
    began=$SECONDS
    if bench_into "$work/mfu.json" 1024 --recompute none --gradient-accumulation 4; then
      judge speed_mfu $((SECONDS - began)) mfu "$work/mfu.json"
    else
      record speed_mfu failed $((SECONDS - began)) "$(grep -m 1 -E '^error' "$work/log")"
    fi
  fi
  if speed speed_stages; then
    began=$SECONDS failed_one=
    for file in 0 0,0 0,0,0; do
      bench_into "$work/stages-$file.json" 512 --devices "$file" --recompute block || failed_one=$file
    done
    if [ -z "$failed_one" ]; then
      judge speed_stages $((SECONDS - began)) stages "$work"/stages-{0,0\,0,0\,0\,0}.json
    else
      record speed_stages failed $((SECONDS - began)) "--devices $failed_one: $(grep -m 1 -E '^error' "$work/log")"
    fi
  fi
  if speed speed_memory; then
    # The limits are those that docs/PERFORMANCE.md states, in GB of 10^9 bytes.
    memory_rise speed_memory_lora_1x512 13.5 512
    memory_rise speed_memory_lora_4x1024 16.5 1024 --micro-batch-size 4
    memory_rise speed_memory_prefix_int4_1x128 5.5 128 --adapter prefix --pre-seq-len 128 --quantization int4
  fi
  if speed speed_peers; then
    began=$SECONDS
    if [ ! -e "$root/scripts/peers/compare.py" ] || ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
      record speed_peers skipped 0 "$python has no torch with CUDA: scripts/peers/setup.sh, then PYTHON"
    elif timeout 530 "$python" "$root/scripts/peers/compare.py" --mp-train "$bin/mp-train" --device cuda --size "${PEERS_SIZE:-chatglm-6b}" \
      --comparisons "${PEERS:-lora-uniform}" --work "$work/peers" --output "$work/peers.json" >"$work/log" 2>&1; then
      record speed_peers passed $((SECONDS - began)) "$(tail -n 1 "$work/log")" "$(tr -d '\n' <"$work/peers.json")"
    else
      record speed_peers failed $((SECONDS - began)) "$(tail -n 1 "$work/log")"
    fi
  fi
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
    check golden_f16_sums "$bin/golden" --exact golden_cuda_f16_sums --nocapture
    check train "$root/scripts/check_gpu.sh" step train "$bin" "$work"
    check train_f16_sums "$root/scripts/check_gpu.sh" step train_f16_sums "$bin" "$work"
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
    measure bench_lora_1x512_f16_sums --size chatglm-6b --sequence-length 512 --product-sums f16
    measure bench_lora_4x1024_f16_sums --size chatglm-6b --micro-batch-size 4 --sequence-length 1024 --product-sums f16
    measure bench_prefix_int4_1x128 --size chatglm-6b --adapter prefix --quantization int4 --sequence-length 128
    measure bench_lora_int4_1x512 --size chatglm-6b --quantization int4 --sequence-length 512
    measure bench_two_stages --size chatglm-6b --devices 0,0 --sequence-length 512 --recompute block
    measure bench_prefix_1x512 --size chatglm-6b --adapter prefix --sequence-length 512
    measure bench_chatglm2_lora_4x1024 --size chatglm2-6b --micro-batch-size 4 --sequence-length 1024 --recompute block
    measure bench_glm4_lora_1x512 --size glm-4-9b --sequence-length 512 --recompute block
    speed_checks
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
