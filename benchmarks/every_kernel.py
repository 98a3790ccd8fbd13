"""Run every op once at small, odd sizes, forward and backward: what compute-sanitizer watches.

``python benchmarks/every_kernel.py`` runs on the GPU where there is one, else on the CPU. Answers are the tests'
business.
"""

from collections.abc import Callable, Iterator
from itertools import product

import torch

import qts_kernels
from qts_kernels.nn import QTSplus
from qts_kernels.testing import make_relevance_inputs, ragged_cu_seqlens

Outputs = Iterator[tuple[torch.Tensor, ...]]


def relevance(draw: Callable, dtype: torch.dtype, device: str) -> Outputs:
    inputs = make_relevance_inputs([3, 0, 17], [70, 5, 131], head_dim=64, dtype=dtype, device=device)
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    for reduce, causal in product(("max", "mean"), (False, True)):
        yield (qts_kernels.relevance(**inputs, reduce=reduce, causal=causal),)
        yield (qts_kernels.relevance(**inputs, reduce=reduce, causal=causal, columns=[(1, 60), (0, 0), (7, 131)]),)


def selection(draw: Callable, dtype: torch.dtype, device: str) -> Outputs:
    cu_seqlens = ragged_cu_seqlens([700, 0, 3001], device)
    scores, tokens = draw(3701).float().detach(), draw(3701, 129)
    for n in (5, torch.tensor([100, 4, 2999], device=device)):
        kept = qts_kernels.topn_gather(tokens, scores, n, draw(3701), cu_seqlens=cu_seqlens, max_n=3000)
        yield kept.tokens, *kept.extras
    yield (qts_kernels.rms_scale(tokens),)
    rho = torch.tensor([0.1, 0.5, 0.9], device=device)
    yield (qts_kernels.soft_threshold(draw(3701).float(), rho, 0.1, cu_seqlens=cu_seqlens),)
    yield (qts_kernels.allocate_tokens(scores.square(), 999, cap=7),)


def frames(draw: Callable, dtype: torch.dtype, device: str) -> Outputs:
    sizes = torch.tensor([[5, 7], [0, 3], [1, 1], [2, 6]], device=device)
    for mode in ("bilinear", "adaptive_avg", "linspace"):
        yield qts_kernels.resize_frames(draw(4, 5, 7, 67), sizes, mode, max_tokens=60)[:1]
    counts = torch.tensor([33, 1, 8], device=device)
    for compat in (False, True):
        yield qts_kernels.merge_tokens(draw(3, 33, 67), counts, max_tokens=50, compat=compat)[:1]


def reencoder(draw: Callable, dtype: torch.dtype, device: str) -> Outputs:
    indices = torch.tensor([0, 3, 17, -1], device=device)
    yield qts_kernels.gather_add_rms_norm(draw(18, 130), indices, draw(4, 130), draw(130))
    yield qts_kernels.add_rms_norm(draw(7, 130), draw(7, 130), draw(130))
    yield (qts_kernels.bias_gelu(draw(7, 130), draw(130)),)
    module = QTSplus(128, 2, 1, n_max=16).to(device, dtype).train()
    yield (module(draw(2, 50, 128), draw(2, 9, 128)).tokens,)


GROUPS = relevance, selection, frames, reencoder


def run(device: str) -> None:
    """Every op, forward and backward, in float32 and bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    for of, dtype in product(GROUPS, (torch.float32, torch.bfloat16)):

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype).requires_grad_()

        for outputs in of(draw, dtype, device):
            losses = [out.float().square().sum() for out in outputs if out.requires_grad]
            if losses:
                torch.stack(losses).sum().backward()
        print(of.__name__, str(dtype).removeprefix("torch."), flush=True)


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    run(where)
    if where == "cuda":
        torch.cuda.synchronize()
