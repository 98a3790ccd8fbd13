"""Every op from tiny to large on the CPU: nowhere slower than its eager reference, which keeps the same contract.

Beside it, where people write the op in a line or two of PyTorch, those lines: they check nothing, and few keep the
contract (ties, NaN, index -1), so at a few rows they are what a call costs, not what an op costs.
"""

import math
from collections.abc import Callable

import pytest
import torch
from guard import REFERENCE
from test_reencode import rms_norm
from test_scoring import eager_relevance, referred
from torch.nn import functional as F

import qts_kernels
from qts_kernels.testing import assert_within_budget

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LINES = "a line of PyTorch"
ONE_DTYPE = ("topn", "soft_threshold", "allocate_tokens")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the grid of sizes is the CPU's")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def relevance(dtype, heads, kv_heads, head_dim, length, m):
    inputs = draw(1, length, heads, head_dim, dtype=dtype), draw(1, m, kv_heads, head_dim, dtype=dtype)
    return qts_kernels.relevance, inputs, eager_relevance


def rms_scale(dtype, m, d):
    return qts_kernels.rms_scale, (draw(m, d, dtype=dtype),), lambda x: (x.float().square().mean(-1) + 1e-6).rsqrt()


def topn(dtype, m, n):
    scores = draw(m, dtype=dtype)
    return lambda s: qts_kernels.topn(s, n)[0], (scores,), lambda s: torch.topk(s, n).indices.sort().values


def gather_tokens(dtype, m, n, d):
    indices = torch.randperm(m, generator=torch.Generator().manual_seed(0))[:n].sort().values
    return qts_kernels.gather_tokens, (draw(m, d, dtype=dtype), indices), lambda x, i: x.index_select(0, i)


def soft_threshold(dtype, m):
    rho = torch.tensor([0.1])
    return lambda s: qts_kernels.soft_threshold(s, rho.to(s), 0.1), (draw(1, m, dtype=dtype),), None


def allocate_tokens(dtype, t):
    return lambda w: qts_kernels.allocate_tokens(w, 8 * t), (draw(t, dtype=dtype).square(),), None


def resize_frames(dtype, t, side, d):
    frames, sizes = draw(t, side, side, d, dtype=dtype), torch.arange(2 * t).view(t, 2) % side + 1

    def loop(frames):
        images = (
            F.interpolate(frame.permute(2, 0, 1)[None], size=size, mode="bilinear")
            for frame, size in zip(frames, sizes.tolist(), strict=True)
        )
        return torch.cat([image[0].permute(1, 2, 0).reshape(-1, d) for image in images])

    return lambda x: qts_kernels.resize_frames(x, sizes)[0], (frames,), loop


def merge_tokens(dtype, t, n, d):
    counts = torch.full((t,), n // 2)
    return lambda x: qts_kernels.merge_tokens(x, counts)[0], (draw(t, n, d, dtype=dtype),), None


def add_rms_norm(dtype, n, d):
    inputs = draw(n, d, dtype=dtype), draw(n, d, dtype=dtype), draw(d, dtype=dtype)
    return lambda *a: qts_kernels.add_rms_norm(*a)[1], inputs, lambda x, r, w: rms_norm(x + r, w)


def gather_add_rms_norm(dtype, n, d):
    indices = torch.arange(0, 3 * n, 3)
    inputs = draw(3 * n, d, dtype=dtype), indices, draw(n, d, dtype=dtype), draw(d, dtype=dtype)
    ours = lambda *a: qts_kernels.gather_add_rms_norm(*a)[1]  # noqa: E731
    return ours, inputs, lambda x, i, a, w: rms_norm(x.index_select(0, i) + a, w)


def bias_gelu(dtype, n, d):
    return qts_kernels.bias_gelu, (draw(n, d, dtype=dtype), draw(d, dtype=dtype)), lambda x, b: F.gelu(x + b)


ROWS = [(1, 8), (10, 64), (100, 1024), (1000, 2048), (10_000, 2048)]
GRID: dict[Callable, list[tuple[int, ...]]] = {
    relevance: [
        *[(1, 1, 8, 1, 1), (2, 1, 16, 1, 10), (4, 2, 16, 4, 64), (12, 2, 128, 1, 100), (12, 2, 128, 8, 256)],
        *[(16, 2, 128, 32, 1000), (16, 2, 128, 1, 16384), (16, 2, 128, 256, 1000), (28, 4, 128, 64, 4096)],
    ],
    rms_scale: ROWS,
    topn: [
        *[(m, math.ceil(m * share)) for m in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000) for share in (0.1, 0.5)],
        *[(1000, 10), (10_000, 10), (100_000, 10), (1_000_000, 10)],
    ],
    gather_tokens: [
        (m, math.ceil(m / 10), d) for m, d in ((10, 8), (100, 64), (1000, 1024), (10_000, 2048), (100_000, 1024))
    ],
    soft_threshold: [(1,), (100,), (10_000,), (1_000_000,)],
    allocate_tokens: [(1,), (10,), (160,), (10_000,)],
    resize_frames: [(1, 2, 8), (4, 7, 64), (16, 14, 256), (16, 27, 1024)],
    merge_tokens: [(1, 4, 8), (2, 16, 64), (4, 64, 256), (8, 196, 1024)],
    gather_add_rms_norm: ROWS,
    add_rms_norm: ROWS,
    bias_gelu: ROWS,
}
CASES = [
    pytest.param(of, dtype, shape, id=f"{of.__name__}-{dtype}-{'x'.join(map(str, shape))}")
    for of, shapes in GRID.items()
    for shape in dict.fromkeys(shapes)
    for dtype in (("fp32",) if of.__name__ in ONE_DTYPE else DTYPES)
]


@pytest.mark.parametrize("who", ["qts_kernels", REFERENCE, LINES])
@pytest.mark.parametrize("of,dtype,shape", CASES)
@torch.inference_mode()
def test_size(timed, of, dtype, shape, who):
    ours, inputs, lines = of(DTYPES[dtype], *shape)

    reference = referred(ours)
    if who == LINES and lines is None:
        pytest.skip("nobody writes it in a line")
    if who == "qts_kernels":
        got, eager = ours(*inputs), reference(*inputs)
        if got.is_floating_point():
            exact = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
            assert_within_budget(got, eager, exact)
        else:
            assert torch.equal(got, eager)
    run = {"qts_kernels": ours, REFERENCE: reference, LINES: lines}[who]
    timed(of.__name__, f"{dtype} {' x '.join(map(str, shape))}", who, lambda: run(*inputs), seconds=0.3)
