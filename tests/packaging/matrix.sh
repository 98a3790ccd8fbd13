#!/usr/bin/env bash
# Install one wheel in a clean environment for each Python and torch, and run the tests of the ops and modules there.
# usage: matrix.sh WHEEL "PYTHON ..." "TORCH ..."   e.g. matrix.sh dist/*.whl "python3.10 python3.13" "2.10.0 2.13.0"
# An environment takes about 7 GB and is removed when its tests have ended.
set -euo pipefail
wheel=$(realpath "$1")
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/tests" "$root/benchmarks" "$root/pyproject.toml" "$work"  # without the packages: the installed ones are tested
cd "$work"
unset PYTHONPATH
tests="tests/ops/test_topn.py tests/ops/test_gather_tokens.py tests/ops/test_resize_frames.py tests/ops/test_cpu_instruction_sets.py tests/nn"
status=0
for python in $2; do
  for torch in $3; do
    "$python" -m venv venv
    # numpy 2.4 breaks Triton 3.6's interpreter on the CPU.
    venv/bin/python -m pip install --quiet --disable-pip-version-check "torch==$torch" "numpy<2.4" pytest pytest-benchmark pytest-xdist hypothesis "$wheel"
    served=$(venv/bin/python -c 'from qts_kernels import backends; print(*sorted({r.implementation for r in backends.report() if r.device == "cpu"}))')
    result=$(venv/bin/python -m pytest $tests -n "${JOBS:-2}" -p no:cacheprovider -k "not triton and not compile" 2>&1 | tail -n 15) || status=1
    echo "$(venv/bin/python -V), torch $torch, served by $served: $(tail -n 1 <<<"$result")"
    [ "$status" -eq 0 ] || { echo "$result"; exit 1; }
    rm -rf venv
  done
done
