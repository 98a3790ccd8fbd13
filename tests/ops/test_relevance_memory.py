"""relevance never holds the attention matrix: its peak extra memory is measured in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from qts_kernels import _native

MEASURE = """
import gc, sys, torch, qts_kernels

def kib(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field))

def run(m):
    key = torch.randn(1, m, 2, 128).to(dtype)
    query = torch.randn(1, 32, 16, 128).to(dtype)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak to what is resident now
    before = kib("VmRSS")
    qts_kernels.relevance(query, key, reduce=sys.argv[2])
    return kib("VmHWM") - before

dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(2)
run(2000)  # code pages, thread pools and allocator arenas are not the op's
print(run(100_000))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(_native.absent("_C") is not None, reason="eager PyTorch does hold the matrix")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_peak_extra_memory_is_at_most_5_percent_of_the_score_matrix(dtype, reduce):
    done = subprocess.run([sys.executable, "-c", MEASURE, dtype, reduce], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    matrix_kib = 16 * 32 * 100_000 * 4 / 1024
    assert int(done.stdout) <= 0.05 * matrix_kib
