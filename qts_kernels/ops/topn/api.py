"""Exact segmented Top-n."""

import torch
from torch import Tensor

import qts_kernels.ops.topn.register  # noqa: F401
from qts_kernels._checks import check_cu_seqlens, check_same, check_tensor
from qts_kernels._segments import uniform_cu_seqlens

SCORES = (torch.float32, torch.bfloat16, torch.float16)


def topn(
    scores: Tensor, n: int | Tensor, *, cu_seqlens: Tensor | None = None, max_n: int | None = None
) -> tuple[Tensor, Tensor]:
    """The n best rows of each segment, exactly, in ascending index order.

    The order is (score descending, index ascending); NaN ranks below -inf and -0 equals +0. The same bits come out on
    every run and every backend.

    Args:
        scores: [B, M], one segment a row, or [sum M] with ``cu_seqlens``, or [M], one segment. float32, bfloat16 or
            float16.
        n: how many to keep of each segment: an int, or an int64 or int32 tensor [S] on the device of ``scores``.
            Clamped to [0, segment length]; a negative int, or a negative entry of a CPU tensor, raises.
        cu_seqlens: int32 [S+1] offsets of the packed segments.
        max_n: an upper bound of ``n`` that sets the shape of the result; larger entries of ``n`` are clamped to it.
            Default: ``n`` itself where it is an int, else the number of scores.

    Returns:
        indices: int64 [min(S * max_n, scores.numel())], rows of the packed (flattened) axis, segment after segment
            without gaps; -1 behind ``cu_seqlens_out[-1]``.
        cu_seqlens_out: int32 [S+1].

        The shapes depend on host values alone, so nothing synchronises and the call can be captured in a CUDA graph.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, counts or cu_seqlens that do not fit.
    """
    check_tensor(
        "scores",
        scores,
        (1, 2) if cu_seqlens is None else 1,
        "[M] or [B, M]" if cu_seqlens is None else "[sum M]",
        SCORES,
    )
    if cu_seqlens is None:
        segments, length = scores.shape if scores.ndim == 2 else (1, scores.shape[0])
        if segments == 0:
            raise ValueError(f"scores must have at least one segment, got shape {list(scores.shape)}")
        cu_seqlens, longest = uniform_cu_seqlens(segments, length, scores.device), length
    else:
        check_cu_seqlens("cu_seqlens", cu_seqlens, "scores", scores)
        segments, longest = cu_seqlens.shape[0] - 1, scores.shape[0]
    if max_n is not None and max_n < 0:
        raise ValueError(f"max_n must not be negative, got {max_n}")
    if isinstance(n, Tensor):
        check_tensor("n", n, 1, "[S]", (torch.int64, torch.int32))
        if n.shape[0] != segments:
            raise ValueError(f"n must have one entry for each of {segments} segments, got {list(n.shape)}")
        check_same("n", n, "scores", scores, dtype=False)
        bound = longest if max_n is None else min(max_n, longest)
        n = n.to(torch.int64)
    else:
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"n must be an int or an int tensor [S], got {type(n).__name__}")
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        bound = min(n, longest) if max_n is None else min(n, max_n, longest)
        n = torch.full((segments,), bound, dtype=torch.int64, device=scores.device)
    return torch.ops.qts_kernels.topn(scores.flatten().float(), cu_seqlens, n, bound)
