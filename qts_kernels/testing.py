"""For tests, ours and users': error budgets, poisoned memory, input makers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def assert_within_budget(
    ours: Tensor, eager: Tensor, exact: Tensor, *, factor: float = 2.0, atol: float = 1e-6
) -> None:
    """Raise AssertionError unless our largest error is at most ``factor`` times eager's in that dtype, plus ``atol``.

    Args:
        ours: the result under test.
        eager: eager PyTorch's result from the same inputs in the same dtype.
        exact: the result computed in float64 from the same (rounded) inputs.
        factor, atol: the budget max|ours - exact| <= factor * max|eager - exact| + atol.

    NaN and infinities must stand where ``exact`` has them, with the same sign.
    """
    if ours.shape != exact.shape or eager.shape != exact.shape:
        raise AssertionError(
            f"shapes differ: ours {list(ours.shape)}, eager {list(eager.shape)}, exact {list(exact.shape)}"
        )
    ours, eager, exact = (x.detach().double().cpu() for x in (ours, eager, exact))
    finite = exact.isfinite()
    if not torch.equal(ours[~finite].nan_to_num(nan=7.0), exact[~finite].nan_to_num(nan=7.0)):
        raise AssertionError("NaN or infinite entries of exact are not the same in ours")
    if not ours[finite].isfinite().all():
        raise AssertionError(f"{int((~ours[finite].isfinite()).sum())} entries are not finite where exact is")
    if not finite.any():
        return
    error = (ours[finite] - exact[finite]).abs().max().item()
    eager_error = (eager[finite] - exact[finite]).nan_to_num(posinf=torch.inf).abs().max().item()
    budget = factor * eager_error + atol
    if not error <= budget:
        raise AssertionError(
            f"error {error:.3e} exceeds the budget {budget:.3e} = {factor} x {eager_error:.3e} + {atol:.0e}"
        )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the context, ``torch.empty`` is filled with NaN, and with the largest value where the dtype is an integer.

    A kernel that leaves an element unwritten then fails its test. Memory that C++ code takes from torch is filled too.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def ragged_cu_seqlens(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 [S+1] offsets of segments of the given lengths."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def make_relevance_inputs(
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Packed random inputs of ``relevance``, by argument name: query, key, key_scale, cu_seqlens_q, cu_seqlens_k."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator}
    return {
        "query": torch.randn(sum(query_lengths), heads, head_dim, **draw).to(device, dtype),
        "key": torch.randn(sum(key_lengths), kv_heads, head_dim, **draw).to(device, dtype),
        "key_scale": (0.5 + torch.rand(sum(key_lengths), **draw)).to(device),
        "cu_seqlens_q": ragged_cu_seqlens(query_lengths, device),
        "cu_seqlens_k": ragged_cu_seqlens(key_lengths, device),
    }
