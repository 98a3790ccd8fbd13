#!/usr/bin/env bash
# On a GPU machine, in one call: build, test, sanitize, benchmark. Uses the python3 on the PATH, with the torch and triton it has, and no network.
# usage: gpu.sh [STEP ...], of: build tests sanitize benchmarks models (all of these where none is named) tune. No command takes more than $STEP_LIMIT seconds (default 540).
# Peers that `make gpu-peers` has put into .whl/ are installed for this run. Results go to benchmarks/results/, and with the logs to $OUT where that is set.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
log=${OUT:-build/gpu}
limit=${STEP_LIMIT:-540}
mkdir -p "$log"
status=0

# run NAME LINES COMMAND...: the last LINES of what it prints, and all of it in a log.
run() {
  local name=$1 lines=$2 code started=$SECONDS
  shift 2
  echo "== $name"
  timeout "$limit" "$@" 2>&1 | tee "$log/$name.log" | tail -n "$lines"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 0 ]; then
    echo "== $name: passed, $((SECONDS - started)) s"
  else
    status=$code
    echo "== $name: FAILED with $code, $((SECONDS - started)) s (124: over $limit s)"
  fi
}

build() {
  # For this card alone: the wheel has code for all of them.
  TORCH_CUDA_ARCH_LIST=$(python3 -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  export TORCH_CUDA_ARCH_LIST
  run build 15 python3 setup.py --quiet build_ext --inplace
}

tests() {
  run tests 25 python3 -m pytest tests/ops tests/nn tests/video/dropin/test_on_a_gpu.py -q --maxfail=20 -p no:cacheprovider
}

sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "== compute-sanitizer is not on this machine: memory and races were not checked"
    status=1
    return
  fi
  for tool in memcheck racecheck initcheck; do
    # Without torch's caching every tensor is an allocation of its own, whose ends the sanitizer sees.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" 5 compute-sanitizer --tool "$tool" --error-exitcode 9 python3 benchmarks/every_kernel.py
  done
}

benchmarks() {
  run benchmarks 150 python3 -m pytest benchmarks --ignore benchmarks/test_end_to_end.py --benchmark-only --record-results -q -p no:cacheprovider
  collect
}

# A process a model, so that what was measured is written even where another runs out of memory or time.
models() {
  for model in Qwen2.5-VL-3B Qwen2.5-VL-7B LLaVA-Video-7B InternVL3-8B; do
    run "$model" 60 python3 -m pytest benchmarks/test_end_to_end.py -k "$model" --benchmark-only --record-results -q -p no:cacheprovider
  done
  collect
}

tune() { run tune 40 python3 benchmarks/tune.py; }

collect() { [ -z "${OUT:-}" ] || find benchmarks/results -newer "$log/started" -type f -exec cp {} "$OUT" \;; }

if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$site"
fi
python3 - <<'PREFLIGHT' || exit 1
import importlib.util
import sys

needed = ("torch", "triton", "numpy", "safetensors", "ninja", "pytest", "pytest_benchmark", "hypothesis", "matplotlib")
missing = [name for name in needed if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"== missing here: {', '.join(missing)}; bring them as wheels in .whl/")
import torch
import triton

if not torch.cuda.is_available():
    sys.exit("== torch sees no GPU here")
peers = {name: importlib.util.find_spec(name) is not None for name in ("flashinfer", "flash_colreduce", "flash_attn")}
print(f"torch {torch.__version__}, triton {triton.__version__};", *(f"{n}: {'yes' if p else 'no'}" for n, p in peers.items()))
PREFLIGHT
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
touch "$log/started"
for step in "${@:-build tests sanitize benchmarks models}"; do
  for name in $step; do
    case $name in
      build | tests | sanitize | benchmarks | models | tune) "$name" ;;
      *) echo "== no step $name: build tests sanitize benchmarks models tune" && exit 2 ;;
    esac
  done
done
exit "$status"
