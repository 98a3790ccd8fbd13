"""Token budgets by largest remainder."""

import torch
from torch import Tensor

import qts_kernels.ops.allocate_tokens.register  # noqa: F401
from qts_kernels._checks import check_cu_seqlens, check_same, check_shape, check_tensor
from qts_kernels._segments import uniform_cu_seqlens
from qts_kernels.ops.allocate_tokens.reference import MAX_TOTAL

INTEGERS = (torch.int64, torch.int32)


def allocate_tokens(
    weights: Tensor, total: int | Tensor, *, cu_seqlens: Tensor | None = None, cap: int | Tensor | None = None
) -> Tensor:
    r"""Share ``total`` tokens among the entries of each segment in proportion to their weights, by largest remainder.

    With R tokens, entry i is due :math:`q_i = R w_i / \sum_j w_j`. An entry due its cap or more gets its cap, and what
    is left of R is shared anew among the others, until no cap binds. The others get :math:`\lfloor q_i \rfloor`, and
    the tokens that this leaves go one each to the largest :math:`q_i - \lfloor q_i \rfloor`, the earlier entry first
    where those are equal. Where all weights that are left are zero, they count as equal.

    The same counts come out on every run and every backend, because nothing is rounded: a weight is taken as an integer
    multiple of a power of two, with 53 bits below the largest weight that still shares (fewer in a segment of more than
    256 entries: 61 - ceil(log2(entries))), and shares and remainders are integers. What a weight has below that is cut.

    Args:
        weights: [T], one segment, or [sum T] with ``cu_seqlens``, for example the squared relevance of each frame.
            float32, bfloat16, float16 or float64. A NaN, infinite or negative weight raises on the CPU; on a GPU, where
            reading it would synchronise, it counts as 0.
        total: how many tokens each segment has to give, in [0, 2^31): an int, or an int64 or int32 tensor [S] on the
            device of ``weights``. An int or an entry of a CPU tensor outside of that range raises; on a GPU it is
            clamped.
        cu_seqlens: int32 [S+1] offsets of the packed segments.
        cap: the most that an entry may get: an int, or an int64 or int32 tensor [sum T], not negative. Default: none.

    Returns:
        int64 [sum T]. Each segment's counts sum to min(total, sum of its caps) exactly (0 where it is empty).

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, weights, totals, caps or cu_seqlens that do not fit.
    """
    check_tensor("weights", weights, 1, "[T]" if cu_seqlens is None else "[sum T]")
    if cu_seqlens is None:
        cu_seqlens = uniform_cu_seqlens(1, weights.shape[0], weights.device)
    else:
        check_cu_seqlens("cu_seqlens", cu_seqlens, "weights", weights)
    segments = cu_seqlens.shape[0] - 1
    if isinstance(total, Tensor):
        check_tensor("total", total, 1, "[S]", INTEGERS)
        if total.shape[0] != segments:
            raise ValueError(f"total must have one entry for each of {segments} segments, got {list(total.shape)}")
        check_same("total", total, "weights", weights, dtype=False)
        total = total.to(torch.int64)
    else:
        _check_int("total", total)
        if total > MAX_TOTAL:
            raise ValueError(f"total must be below 2^31, got {total}")
        total = torch.full((segments,), total, dtype=torch.int64, device=weights.device)
    if isinstance(cap, Tensor):
        check_tensor("cap", cap, 1, "[sum T]", INTEGERS)
        check_shape("cap", cap, weights.shape, "[sum T]")
        check_same("cap", cap, "weights", weights, dtype=False)
        cap = cap.to(torch.int64)
    elif cap is not None:
        _check_int("cap", cap)
        cap = torch.full_like(weights, min(cap, MAX_TOTAL), dtype=torch.int64)
    return torch.ops.qts_kernels.allocate_tokens(weights.detach().double(), cu_seqlens, total, cap)


def _check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or an int tensor, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
