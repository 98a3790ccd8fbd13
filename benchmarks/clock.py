"""A clock of the GPU's own time, for pytest-benchmark."""

from collections.abc import Callable
from functools import cache

import torch

SCRUB_BYTES = 256 << 20
"""Several times the second-level cache of any card so far."""


class GpuClock:
    """Stands still but for what CUDA events around a timed call measured.

    Before each call a buffer is overwritten that is larger than the L2 cache. That is queued like the call itself, so
    the card is still at it while the host launches the call: what is measured begins with a cold cache and holds no
    time of the host, as long as the launches take no longer than the overwriting (some 0.1 ms; a CUDA graph's replay
    is one launch).
    """

    def __init__(self, device: str = "cuda") -> None:
        self._now = 0.0
        self._scrub = _scrub(device)

    def __call__(self) -> float:
        """Seconds, since the clock was made, that timed calls took."""
        return self._now

    def timed(self, run: Callable[[], object]) -> Callable[[], None]:
        """``run`` behind a cold cache, moving this clock."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def call() -> None:
            self._scrub.zero_()
            before.record()
            run()
            after.record()
            after.synchronize()
            self._now += before.elapsed_time(after) / 1e3

        return call


@cache
def _scrub(device: str) -> torch.Tensor:
    """One for all clocks: pytest keeps those of past benchmarks."""
    return torch.empty(SCRUB_BYTES, dtype=torch.int8, device=device)


def captured(run: Callable[[], object]) -> Callable[[], None]:
    """The replay of a CUDA graph of ``run``. Raises where ``run`` synchronises or can't be captured otherwise."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
