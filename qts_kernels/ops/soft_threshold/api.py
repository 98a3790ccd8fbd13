"""The threshold at which a soft gate keeps a given share."""

import torch
from torch import Tensor

import qts_kernels.ops.soft_threshold.register  # noqa: F401
from qts_kernels._checks import check_cu_seqlens, check_same, check_tensor
from qts_kernels._segments import uniform_cu_seqlens

DTYPES = (torch.float32, torch.float64)


def soft_threshold(scores: Tensor, rho: Tensor, tau: float, *, cu_seqlens: Tensor | None = None) -> Tensor:
    r"""The t of each segment that solves :math:`\sum_i \sigma((r_i - t) / \tau) = \rho M` (QTSplus, arXiv 2511.11910).

    The iteration keeps the root in a bracket that holds it from the start, so it cannot diverge, whatever the scores.

    Args:
        scores: r, [B, M], or [sum M] with ``cu_seqlens``. float32 (float64 for checking).
        rho: [S], the share to keep, in (0, 1); the dtype of ``scores``. On a GPU, where reading it would synchronise,
            0 gives +inf and 1 gives -inf.
        tau: temperature, above 0, in units of the scores.
        cu_seqlens: int32 [S+1] offsets of the packed segments.

    Returns:
        t [S]; 0 for an empty segment, NaN where a score is not finite. Differentiable in scores and rho by the implicit
        function theorem: with s' = s (1 - s) / tau, dt/d rho = -M / sum s' and dt/d r_i = s'_i / sum s'.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices, rho, tau or cu_seqlens that do not fit.
    """
    check_tensor(
        "scores",
        scores,
        2 if cu_seqlens is None else 1,
        "[B, M]" if cu_seqlens is None else "[sum M]",
        DTYPES,
    )
    if cu_seqlens is None:
        segments = scores.shape[0]
        if segments == 0:
            raise ValueError(f"scores must have at least one segment, got shape {list(scores.shape)}")
        cu_seqlens = uniform_cu_seqlens(segments, scores.shape[1], scores.device)
    else:
        check_cu_seqlens("cu_seqlens", cu_seqlens, "scores", scores)
        segments = cu_seqlens.shape[0] - 1
    check_tensor("rho", rho, 1, "[S]", DTYPES)
    if rho.shape[0] != segments:
        raise ValueError(f"rho must have one entry for each of {segments} segments, got {list(rho.shape)}")
    check_same("rho", rho, "scores", scores)
    if not tau > 0:
        raise ValueError(f"tau must be above 0, got {tau}")
    return torch.ops.qts_kernels.soft_threshold(scores.flatten(), rho, cu_seqlens, float(tau))
