"""Rows of tokens and of what belongs to them."""

import torch
from torch import Tensor

import qts_kernels.ops.gather_tokens.register  # noqa: F401
from qts_kernels._checks import check_same, check_tensor


def gather_tokens(tokens: Tensor, indices: Tensor, *extras: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Rows ``indices`` of ``tokens`` and of each of ``extras`` (positions, timestamps, ...), in one pass; zeros where
    the index is -1.

    Args:
        tokens: [M, ...], any dtype.
        indices: int64 [N], in [0, M) or -1. On the CPU another value raises; on a GPU, where reading it would
            synchronise, its row is zeros.
        extras: each [M, ...], any dtype.

    Returns:
        [N, ...] alone, or a tuple (tokens, *extras) of such. Differentiable in tokens and extras; the gradients of
        repeated rows add up.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices or indices that do not fit.
    """
    for name, x in (("tokens", tokens), *((f"extras[{i}]", e) for i, e in enumerate(extras))):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor [M, ...], got {type(x).__name__}")
        if x.ndim == 0 or x.shape[0] != tokens.shape[0]:
            raise ValueError(
                f"{name} must have shape [M, ...] with the M of tokens, {list(tokens.shape)}, got {list(x.shape)}"
            )
        check_same(name, x, "tokens", tokens, dtype=False)
    check_tensor("indices", indices, 1, "[N]", (torch.int64,))
    check_same("indices", indices, "tokens", tokens, dtype=False)
    out = torch.ops.qts_kernels.gather_rows([tokens, *extras], indices)
    return tuple(out) if extras else out[0]
