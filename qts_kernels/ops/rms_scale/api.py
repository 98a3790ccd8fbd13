"""The scale of RMSNorm, without the norm."""

import torch
from torch import Tensor

import qts_kernels.ops.rms_scale.register  # noqa: F401
from qts_kernels._checks import check_tensor


def rms_scale(x: Tensor, eps: float = 1e-6) -> Tensor:
    r"""1/rms of each row, in one read: :math:`(\tfrac1D \sum_d x_d^2 + \epsilon)^{-1/2}`.

    Pass it to ``relevance(key_scale=...)`` beside keys projected from the *raw* tokens by a weight that the RMSNorm's
    own weight is folded into: RMSNorm(x) W = (1/rms) * (x (w * W)), so the normalised tokens are never written.

    Args:
        x: [..., D] float32, bfloat16 or float16 (float64 for checking); D >= 1.
        eps: added to the mean square.

    Returns:
        fp32 [...] (float64 for float64 input). Differentiable in x.

    Raises:
        TypeError, ValueError: where x is no floating tensor with at least one axis, or D is 0.
    """
    check_tensor("x", x, range(1, 9), "[..., D]")
    if x.shape[-1] == 0:
        raise ValueError(f"x must have shape [..., D] with D >= 1, got {list(x.shape)}")
    return torch.ops.qts_kernels.rms_scale(x, eps)
