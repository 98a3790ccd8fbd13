"""``make gpu-rehearsal``: the benchmarks for a GPU on the pretended one, at the CPU's sizes and each call once.

No time of it means anything. What it finds is a row that a card would lose: a tensor on the other device, a call that
waits where a graph is captured, an answer that its check refuses.
"""

import sys
from pathlib import Path

import ceilings
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import pretended_gpu.plugin  # noqa: F401  it makes the card

RESULTS = Path(ceilings.__file__).parent / "results"


def is_available() -> bool:
    """Not where a benchmark chooses its sizes."""
    caller = sys._getframe(1).f_code
    return caller.co_name != "<module>" or Path(caller.co_filename).parent != RESULTS.parent


def once(self: BenchmarkFixture, target, **_: object) -> object:
    return _pedantic(self, target, rounds=1, iterations=1)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    for path in RESULTS.glob("pretended*"):
        path.unlink()


_pedantic = BenchmarkFixture.pedantic
BenchmarkFixture.pedantic = once
torch.cuda.is_available = is_available
ceilings.copy_rate = lambda device: 1e12
ceilings.multiply_rate = lambda device, dtype: 1e14
