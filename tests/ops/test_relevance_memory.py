"""relevance never holds the attention matrix: its peak extra memory is measured in a process of its own."""

import subprocess
import sys
from itertools import product
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
    query = torch.randn(1, length, 16, 128).to(dtype)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the peak to what is resident now
    before = kib("VmRSS")
    qts_kernels.relevance(query, key, reduce=sys.argv[2], **options)
    return kib("VmHWM") - before

dtype, length = getattr(torch, sys.argv[1]), int(sys.argv[3])
options = {"causal": True, "columns": (20, 1000)} if "causal" in sys.argv else {}
torch.set_num_threads(2)
run(2000)  # code pages, thread pools and allocator arenas are not the op's
print(run(100_000))
"""


pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
    pytest.mark.skipif(_native.absent("_C") is not None, reason="eager PyTorch does hold the matrix"),
]
CASES = pytest.mark.parametrize("dtype, reduce", list(product(["float32", "bfloat16"], ["max", "mean"])))


def peak_kib(*arguments: str) -> int:
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def matrix_kib(length: int) -> float:
    return 16 * length * 100_000 * 4 / 1024


@CASES
def test_peak_extra_memory_is_at_most_5_percent_of_the_score_matrix(dtype, reduce):
    assert peak_kib(dtype, reduce, "32") <= 0.05 * matrix_kib(32)


@CASES
def test_memory_does_not_grow_with_text_times_vision(dtype, reduce):
    """As FlexSelect asks: causal, the scores of some columns."""
    short, long = (peak_kib(dtype, reduce, str(length), "causal") for length in (16, 128))
    assert long - short <= 0.01 * (matrix_kib(128) - matrix_kib(16))
