#!/usr/bin/env bash
# Everything that only a GPU can show, in one command of under 9 minutes, with no network:
#   benchmarks/gpu_run.sh OUT [--only build|tests|memcheck|racecheck|bench] [--dry-run]
# OUT gets a log of each stage and gpu_low_rank.json, which belongs in
# benchmarks/results/<the device it names>/. A stage that OUT/done lists is not run again: delete it to start over.
# --dry-run takes the same path on the CPU with tiny shapes. PYTHON names an interpreter with torch, Triton and pytest.
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
case $ONLY in
  "" | build | tests | memcheck | racecheck | bench) ;;
  *) echo "unknown stage $ONLY" >&2; exit 2 ;;
esac
PYTHON=${PYTHON:-python3}
export PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
DONE=$OUT/done$DRY
failed=0 reached=0
if [ -z "$DRY" ] && ! "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  echo "$PYTHON's torch sees no GPU; --dry-run does without" >&2
  exit 1
fi

stage() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  [ -z "$ONLY" ] || [ "$ONLY" = "$name" ] || return 0
  reached=1
  if grep -qx "$name" "$DONE" 2>/dev/null; then
    echo "$name: done before"
    return 0
  fi
  local start=$SECONDS
  if timeout "$limit" "$@" >"$OUT/$name.log" 2>&1; then
    echo "$name" >>"$DONE"
    echo "$name: passed in $((SECONDS - start)) s"
  else
    echo "$name: FAILED with $? after $((SECONDS - start)) s, the end of $OUT/$name.log:"
    tail -25 "$OUT/$name.log"
    failed=1
  fi
}

# Several processes compile several kernels at a time.
workers=$("$PYTHON" -c "import xdist" 2>/dev/null && [ -z "$DRY" ] && echo "-n 12")
stage build 90 env LORA_KERNELS_BUILD=cpu "$PYTHON" setup.py -q build_ext --inplace
stage tests 220 "$PYTHON" -m pytest tests/gpu -q --tb=short -p no:cacheprovider $workers
if [ -z "$DRY" ] && command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    stage "$tool" 40 compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" benchmarks/gpu_small.py
  done
fi
stage bench 150 "$PYTHON" benchmarks/gpu_low_rank.py --out "$OUT" $DRY
[ $reached = 1 ] || { echo "$ONLY cannot run here" >&2; exit 1; }
exit $failed
