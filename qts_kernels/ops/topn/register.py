"""Dispatch of topn."""

import torch

from qts_kernels import backends
from qts_kernels._checks import check_cu_seqlens_values, check_not_negative_values
from qts_kernels.ops.topn import reference


def _triton():
    from qts_kernels.ops.topn import triton

    return triton.topn


backends.register("topn", reference.topn, native=("cpu",), triton=_triton)


@torch.library.impl("qts_kernels::topn", ("cpu", "cuda"))
def _topn(scores, cu_seqlens, n, max_n):
    check_cu_seqlens_values("cu_seqlens", cu_seqlens, scores.shape[0])
    check_not_negative_values("n", n)
    return backends.implementation("topn", scores)(scores, cu_seqlens, n, max_n)
