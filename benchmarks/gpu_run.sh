#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under 9 minutes, with no network:
#   benchmarks/gpu_run.sh OUT [--only build|tests|memcheck|racecheck|transforms|tune|training|quantized|bench] [--dry-run]
# A stage ends at its limit, the benchmarks at the end of the 9 minutes. OUT gets a log of each stage and
# gpu_low_rank.json, gpu_lora_linear.json, gpu_quantized.json and gpu_transforms.json, which belong in
# benchmarks/results/<the device they name>/, and <device>.json, which belongs in kernels/configs/. A stage that
# OUT/done lists is not run again: delete it to start over.
# --dry-run takes the same path on the CPU with tiny shapes. PYTHON names an interpreter with torch, Triton and pytest,
# LORA_KERNELS_PEERS a folder of other projects' kernels to time beside ours (benchmarks/peers.py).
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${1:?usage: benchmarks/gpu_run.sh OUT [--only STAGE] [--dry-run]}
shift
ONLY= DRY=
while [ $# -gt 0 ]; do
  case $1 in
    --only) ONLY=$2; shift 2 ;;
    --dry-run) DRY=--dry-run; shift ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
  esac
done
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
DONE=$OUT/done$DRY
WHOLE=525 # seconds
failed=0 reached=0
if [ -z "$DRY" ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "$PYTHON's torch sees no GPU; --dry-run does without" >&2
  exit 1
fi

group=
end_group() { kill -KILL -- "-$group" 2>/dev/null; } # timeout leads a process group: what a stage left behind
trap 'end_group; exit 130' INT TERM

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  [ -z "$ONLY" ] || [ "$ONLY" = "$name" ] || return 0
  reached=1
  if grep -qx "$name" "$DONE" 2>/dev/null; then
    echo "$name: done before"
    return 0
  fi
  local start=$SECONDS status=0
  limit=$((limit < WHOLE - start ? limit : WHOLE - start))
  [ $limit -gt 0 ] || limit=1
  timeout -k 2 "$limit" "$@" >"$OUT/$name.log" 2>&1 &
  group=$!
  wait "$group" || status=$?
  end_group
  if [ $status = 0 ]; then
    echo "$name" >>"$DONE"
    echo "$name: passed in $((SECONDS - start)) s"
  else
    echo "$name: FAILED with $status after $((SECONDS - start)) s of at most $limit, the end of $OUT/$name.log:"
    tail -25 "$OUT/$name.log"
    failed=1
  fi
}

# Several processes compile several kernels at a time.
workers=$([ -z "$DRY" ] && "$PYTHON" -c "import xdist" 2>/dev/null && echo "-n 12")
build=cpu architecture=
if [ -z "$DRY" ] && { command -v nvcc || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; } >/dev/null; then
  build=cuda
  architecture=$("$PYTHON" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())")
elif [ -z "$ONLY$DRY" ]; then
  echo "build: without CUDA's kernels, no nvcc in PATH or CUDA_HOME"
fi
stage build 120 env LORA_KERNELS_BUILD=$build TORCH_CUDA_ARCH_LIST=$architecture "$PYTHON" setup.py -q build_ext --inplace
stage tests 240 "$PYTHON" -m pytest tests/gpu -q --tb=short -p no:cacheprovider $workers
for tool in memcheck racecheck; do
  if [ -z "$DRY" ] && command -v compute-sanitizer >/dev/null; then
    stage "$tool" 35 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/gpu_small.py
  elif [ -z "$ONLY$DRY" ]; then
    echo "$tool: not run, no compute-sanitizer in PATH"
  fi
done
stage transforms 40 "$PYTHON" benchmarks/gpu_transforms.py --out "$OUT" --seconds 30 $DRY
stage tune 45 "$PYTHON" benchmarks/tune.py --out "$OUT" $DRY
stage training 40 "$PYTHON" benchmarks/gpu_lora_linear.py --out "$OUT" --seconds 28 $DRY
stage quantized 40 "$PYTHON" benchmarks/gpu_quantized.py --out "$OUT" --seconds 28 $DRY
left=$((WHOLE - SECONDS))
stage bench $left "$PYTHON" benchmarks/gpu_low_rank.py --out "$OUT" --seconds $((left - 30)) \
  ${LORA_KERNELS_PEERS:+--peers "$LORA_KERNELS_PEERS"} $DRY
[ $reached = 1 ] || { echo "$ONLY cannot run here" >&2; exit 1; }
exit $failed
