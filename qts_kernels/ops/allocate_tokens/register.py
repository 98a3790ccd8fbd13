"""Dispatch of allocate_tokens."""

import torch

from qts_kernels import backends
from qts_kernels._checks import check_cu_seqlens_values, check_not_negative_values, check_weight_values
from qts_kernels.ops.allocate_tokens import reference


def _triton():
    from qts_kernels.ops.allocate_tokens import triton

    return triton.allocate_tokens


backends.register("allocate_tokens", reference.allocate_tokens, native=("cpu",), triton=_triton)


@torch.library.impl("qts_kernels::allocate_tokens", ("cpu", "cuda"))
def _allocate_tokens(weights, cu_seqlens, total, cap):
    check_cu_seqlens_values("cu_seqlens", cu_seqlens, weights.shape[0])
    check_weight_values("weights", weights)
    check_not_negative_values("total", total)
    if total.device.type == "cpu" and int(total.max()) > reference.MAX_TOTAL:
        raise ValueError(f"total must be below 2^31, got {int(total.max())}")
    if cap is not None:
        check_not_negative_values("cap", cap)
    # The op takes float64 as its input type, which is no reason to ask for the reference.
    return backends.implementation("allocate_tokens", cu_seqlens)(weights, cu_seqlens, total, cap)
