#!/usr/bin/env bash
# On a GPU machine, in one call: build, test, sanitize, benchmark. Uses the python3 on the PATH, with the torch and triton it has, and no network.
# Results go to benchmarks/results/, and to $OUT where that is set. No step takes more than $STEP_LIMIT seconds (default 170).
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}"
log=${OUT:-benchmarks/results}
mkdir -p "$log"
status=0
limit=${STEP_LIMIT:-170}
step() { echo "== $1"; shift; timeout "$limit" "$@" 2>&1 | tee "$log/$step_name.log" | tail -n "${lines:-15}"; code=${PIPESTATUS[0]}; [ "$code" -eq 0 ] || { status=$code; echo "== failed with $code (124: over $limit seconds)"; }; }

python3 - <<'PREFLIGHT' || exit 1
import importlib.util
import sys

needed = ("torch", "triton", "numpy", "safetensors", "ninja", "pytest", "pytest_benchmark", "hypothesis")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
sys.exit(f"== missing here: {', '.join(missing)}; bring them as wheels" if missing else 0)
PREFLIGHT
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'

step_name=build step "build" python3 setup.py --quiet build_ext --inplace
step_name=tests step "tests on the GPU" python3 -m pytest tests/ops tests/nn tests/video/dropin/test_on_a_gpu.py -q --maxfail=20 -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck; do
    step_name=$tool lines=5 step "compute-sanitizer $tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      python3 -m pytest tests/ops -q -m "gpu and not slow" -p no:cacheprovider
  done
else
  echo "== compute-sanitizer is not on this machine: memory and race checks were not run"
fi
step_name=benchmarks lines=80 step "benchmarks" python3 -m pytest benchmarks --benchmark-only --record-results -q
[ -z "${OUT:-}" ] || cp benchmarks/results/*.json "$OUT"/
exit "$status"
