#!/usr/bin/env bash
# What a session with a GPU runs from the repository's root, nothing installed:
#   benchmarks/gpu_session.sh [STEP ...] [-- FOLDER]
# Steps: doctor, tests, sanitize, report, tune; default: doctor tests sanitize report. Results go to FOLDER (default: benchmarks/results).
# Each step runs whatever the one before it did; the exit code is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/src:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET

steps=()
folder=benchmarks/results
while (($#)); do
  if [[ $1 == -- ]]; then
    folder=${2:?"-- needs a FOLDER"}
    break
  fi
  steps+=("$1")
  shift
done
((${#steps[@]})) || steps=(doctor tests sanitize report)

worst=0
run() {
  echo "== $*"
  "$@"
  local code=$?
  ((code > worst)) && worst=$code
  return 0
}

for step in "${steps[@]}"; do
  case $step in
    doctor) run python3 -m vmoe_torch.cli doctor ;;
    tests)
      # No plugin or option of pyproject.toml that a bare machine may lack.
      run python3 -m pytest -o addopts= -q --maxfail=20 -m gpu tests/gpu
      # On its own, since it wants timm.
      run python3 -m pytest -o addopts= -q -m gpu tests/parallel/test_parallel_gpu.py
      ;;
    sanitize)
      # Without PyTorch's cache of memory, in which an access past a tensor's end still meets memory of the process.
      for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 run compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m benchmarks.compile.sanitize
      done
      ;;
    report) run python3 -m benchmarks.report --out "$folder" ;;
    tune) run python3 -m benchmarks.compile.tune --out "$folder" ;;
    *)
      echo "STEP must be doctor, tests, sanitize, report or tune, got $step" >&2
      exit 2
      ;;
  esac
done
exit "$worst"
