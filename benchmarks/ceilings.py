"""What this machine can do at best, measured: how fast it copies, how fast it multiplies. The floor of an op's time."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Work:
    """What an op can't avoid."""

    bytes: float = 0.0
    """Read once and written once."""
    flops: float = 0.0
    dtype: torch.dtype = torch.float32
    """Of the matrix products that the FLOPs are in."""

    def floor(self, device: str) -> float:
        """Seconds that no implementation can stay far below: the longer of moving and multiplying."""
        multiplying = self.flops / multiply_rate(device, self.dtype) if self.flops else 0.0
        return max(self.bytes / copy_rate(device), multiplying)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.dtype)


@cache
def copy_rate(device: str) -> float:
    """Bytes a second of a large copy, those read and those written both counted."""
    size = (4 << 30) if device == "cuda" else (256 << 20)
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


@cache
def multiply_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second of a large matrix product of random numbers (zeros would be faster on some cards)."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def measured(device: str) -> dict[str, float]:
    """The ceilings, for the results file: TB/s and TFLOP/s."""
    rates = {f"tflops_{SHORT[dtype]}": round(multiply_rate(device, dtype) / 1e12, 4) for dtype in SHORT}
    return {"copy_tb_s": round(copy_rate(device) / 1e12, 4), **rates}


def _fastest(run: Callable[[], object], device: str, times: int = 7) -> float:
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    taken = []
    for _ in range(times):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken)
