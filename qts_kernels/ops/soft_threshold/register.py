"""Dispatch and autograd of soft_threshold."""

import torch

from qts_kernels import backends
from qts_kernels._checks import check_cu_seqlens_values, check_open_unit_values
from qts_kernels._segments import segment_ids
from qts_kernels.ops.soft_threshold import reference


def _triton():
    from qts_kernels.ops.soft_threshold import triton

    return triton.soft_threshold


backends.register("soft_threshold", reference.soft_threshold, native=("cpu",), triton=_triton)


@torch.library.impl("qts_kernels::soft_threshold", ("cpu", "cuda"))
def _soft_threshold(scores, rho, cu_seqlens, tau):
    check_cu_seqlens_values("cu_seqlens", cu_seqlens, scores.shape[0])
    check_open_unit_values("rho", rho)
    return backends.implementation("soft_threshold", scores)(scores, rho, cu_seqlens, tau)


def _setup_context(ctx, inputs, output):
    scores, _, cu_seqlens, ctx.tau = inputs
    ctx.save_for_backward(scores, cu_seqlens, output)


def _backward(ctx, grad):
    scores, cu_seqlens, t = ctx.saved_tensors
    segment = segment_ids(cu_seqlens, scores.shape[0])
    gate = torch.sigmoid((scores - t[segment]) / ctx.tau)
    slope = gate * (1 - gate) / ctx.tau
    total = torch.zeros_like(t).index_add_(0, segment, slope)
    # An empty segment, or one whose gates are all saturated, has no slope: its threshold does not move.
    share = torch.where(total > 0, grad / total, 0)
    return share[segment] * slope, -share * cu_seqlens.diff(), None, None


torch.library.register_autograd("qts_kernels::soft_threshold", _backward, setup_context=_setup_context)
