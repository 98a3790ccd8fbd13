"""Time relevance with other tiles, on a GPU; each answer is checked against the default tiles' before it is timed.

    python benchmarks/tune.py

The tiles in qts_kernels were chosen by instructions, registers and shared memory (results/triton-resources.md); this
says which of them a card prefers. Times are the card's own behind a cold cache, medians; the default's ratio is 1.00.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from clock import GpuClock, captured

import qts_kernels
from qts_kernels.ops.relevance import triton, triton_backward
from qts_kernels.ops.relevance.triton_tiles import Tiles

KEYS, HEADS, KV_HEADS, HEAD_DIM, TOKENS = 100_000, 28, 4, 128, 64
REPEATS = 30

# Tiles of rows, keys and head size; warps; stages; registers a thread.
STATISTICS = [
    Tiles(128, 64, 128, 8, 2, 128),
    Tiles(128, 64, 128, 8, 3, 128),
    Tiles(128, 64, 128, 8, 2),
    Tiles(128, 128, 128, 8, 2),
    Tiles(64, 64, 128, 4, 3),
    Tiles(64, 128, 128, 4, 2),
]
SCORES = [
    Tiles(64, 128, 128, 8, 2, 128),
    Tiles(64, 128, 128, 8, 3, 128),
    Tiles(64, 256, 128, 8, 2),
    Tiles(64, 256, 128, 8, 2, 128),
    Tiles(32, 256, 128, 8, 3, 128),
    Tiles(64, 128, 128, 4, 2),
    Tiles(64, 64, 128, 4, 3),
]
GRADIENTS = [
    Tiles(64, 64, 128, 4, 2),
    Tiles(64, 64, 128, 4, 3),
    Tiles(64, 128, 128, 8, 2),
    Tiles(64, 64, 128, 8, 2),
    Tiles(32, 64, 128, 4, 2),
]
CHOICES = {
    "statistics": (triton, "row_tiles", STATISTICS),
    "scores": (triton, "key_tiles", SCORES),
    "gradients": (triton_backward, "gradient_tiles", GRADIENTS),
}


@contextmanager
def chosen(what: str, tiles: Tiles) -> Iterator[None]:
    """Within the context the kernels of ``what`` run with ``tiles``."""
    module, name, _ = CHOICES[what]
    default = getattr(module, name)
    setattr(module, name, lambda query, rows: tiles)
    try:
        yield
    finally:
        setattr(module, name, default)


def median(run: Callable[[], object], clock: GpuClock) -> float:
    """Seconds of the card."""
    call, times = clock.timed(captured(run)), []
    for _ in range(REPEATS):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times[3:])


def main() -> None:
    draw = {"generator": torch.Generator("cuda").manual_seed(0), "device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(1, TOKENS, HEADS, HEAD_DIM, **draw).requires_grad_()
    key = torch.randn(1, KEYS, KV_HEADS, HEAD_DIM, **draw).requires_grad_()
    key_scale = torch.rand(1, KEYS, device="cuda") + 0.5

    @torch.inference_mode()
    def forward() -> tuple[torch.Tensor, ...]:
        return (qts_kernels.relevance(query, key, key_scale=key_scale),)

    weight = torch.rand(1, KEYS, device="cuda")

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(
            (qts_kernels.relevance(query, key, key_scale=key_scale) * weight).sum(), (query, key)
        )

    clock = GpuClock()
    for what, (_, _, candidates) in CHOICES.items():
        run = both if what == "gradients" else forward
        truth, default = run(), median(run, clock)
        print(f"{what}: {default * 1e6:.0f} us with the default tiles, forward{' and backward' * (run is both)}")
        for tiles in candidates:
            with chosen(what, tiles):
                try:
                    for found, known in zip(run(), truth, strict=True):
                        torch.testing.assert_close(found, known, rtol=2e-2, atol=1e-5)
                    time = median(run, clock)
                except (RuntimeError, torch.AcceleratorError) as problem:
                    print(f"    {tiles}: {str(problem).splitlines()[0]}")
                    continue
            print(f"    {tiles}: {time * 1e6:.0f} us, {time / default:.2f}")


if __name__ == "__main__":
    main()
