"""The pieces of the time-stamped re-encoder that are not GEMMs or attention, fused."""

import torch
from torch import Tensor

import qts_kernels.ops.reencode.register  # noqa: F401
from qts_kernels._checks import check_same, check_shape, check_tensor


def gather_add_rms_norm(
    tokens: Tensor,
    indices: Tensor,
    addend: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    r"""The entry of a re-encoder: take the kept rows, add their time embedding, and normalise, in one pass.

    residual = tokens[indices] + addend;  normed = residual / sqrt(mean(residual^2) + eps) * weight.

    Args:
        tokens: [M, D] float32, bfloat16 or float16 (float64 for checking).
        indices: int64 [N], in [0, M), or -1 for a padded row, whose residual and normed are zeros.
        addend: [N, D] or None, for example the time embedding of the kept rows.
        weight: [D] of the RMSNorm, or None for ones (where it is folded into the projection that follows).
        eps: added to the mean square.

    Returns:
        residual [N, D] and normed [N, D] in the dtype of tokens. Differentiable in tokens, addend and weight.

    Raises:
        ValueError, TypeError: on shapes, dtypes, devices or indices that do not fit.
    """
    check_tensor("tokens", tokens, 2, "[M, D]")
    check_tensor("indices", indices, 1, "[N]", (torch.int64,))
    check_same("indices", indices, "tokens", tokens, dtype=False)
    if addend is not None:
        check_tensor("addend", addend, 2, "[N, D]")
        check_shape("addend", addend, (indices.shape[0], tokens.shape[1]), "[N, D]")
        check_same("addend", addend, "tokens", tokens)
    _check_weight(weight, "tokens", tokens)
    return torch.ops.qts_kernels.gather_add_rms_norm(tokens, indices, addend, weight, eps)[:2]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """total = x + residual;  normed = total / sqrt(mean(total^2) + eps) * weight, in one pass.

    Args:
        x, residual: [N, D] of one dtype. weight: [D] or None for ones. eps: added to the mean square.

    Returns:
        total [N, D], normed [N, D]. Differentiable in x, residual and weight.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit.
    """
    check_tensor("x", x, 2, "[N, D]")
    check_tensor("residual", residual, 2, "[N, D]")
    check_shape("residual", residual, x.shape, "[N, D]")
    check_same("residual", residual, "x", x)
    _check_weight(weight, "x", x)
    return torch.ops.qts_kernels.add_rms_norm(x, residual, weight, eps)[:2]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    r"""gelu(x + bias) with the exact, erf form of GELU: :math:`y \, \tfrac12 (1 + \mathrm{erf}(y/\sqrt2))`.

    Args:
        x: [N, F]. bias: [F], dtype of x.

    Returns:
        [N, F]. Differentiable in x and bias.

    Raises:
        ValueError, TypeError: on shapes, dtypes or devices that do not fit.
    """
    check_tensor("x", x, 2, "[N, F]")
    check_tensor("bias", bias, 1, "[F]")
    check_shape("bias", bias, x.shape[1:], "[F]")
    check_same("bias", bias, "x", x)
    return torch.ops.qts_kernels.bias_gelu(x, bias)


def _check_weight(weight: Tensor | None, name: str, x: Tensor) -> None:
    if x.shape[1] == 0:
        raise ValueError(f"{name} must have D >= 1, got shape {list(x.shape)}")
    if weight is not None:
        check_tensor("weight", weight, 1, "[D]")
        check_shape("weight", weight, x.shape[1:], "[D]")
        check_same("weight", weight, name, x)
