"""The re-encoder's pieces in eager PyTorch: the specification. Sums are rounded to the input's dtype, norms and
activations are
computed in fp32 from what was rounded, and rounded once."""

import torch
from torch import Tensor
from torch.nn import functional as F

from qts_kernels._schemas import statistics_dtype


def gather_add_rms_norm(tokens: Tensor, indices: Tensor, addend: Tensor | None, weight: Tensor | None, eps: float):
    """See ``qts_kernels.gather_add_rms_norm``."""
    if tokens.shape[0] == 0:
        residual = tokens.new_zeros(indices.shape[0], tokens.shape[1])
    else:
        residual = tokens.index_select(0, indices.clamp(min=0))
    if addend is not None:
        residual = residual + addend
    padded = (indices < 0)[:, None]
    residual = residual.masked_fill(padded, 0)
    normed, rstd = _rms_norm(residual, weight, eps)
    return residual, normed.masked_fill(padded, 0), rstd


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float):
    """See ``qts_kernels.add_rms_norm``."""
    total = x + residual
    return total, *_rms_norm(total, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(statistics_dtype(x))
    rstd = (wide.square().mean(-1) + eps).rsqrt()
    normed = wide * rstd[:, None]
    if weight is not None:
        normed = normed * weight.to(wide.dtype)
    return normed.to(x.dtype), rstd


def rms_norm_backward(grad_normed: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, rstd: Tensor):
    """With h = x rstd and g = grad_normed weight: dx = rstd (g - h mean(g h)) + grad_sum; dweight = sum of
    grad_normed h over rows."""
    wide, grad = x.to(rstd.dtype), grad_normed.to(rstd.dtype)
    normed = wide * rstd[:, None]
    weighted = grad if weight is None else grad * weight.to(rstd.dtype)
    grad_x = rstd[:, None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    if grad_sum is not None:
        grad_x = grad_x + grad_sum.to(rstd.dtype)
    grad_weight = rstd.new_empty(0) if weight is None else (grad * normed).sum(0)
    return grad_x.to(x.dtype), grad_weight


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """See ``qts_kernels.bias_gelu``."""
    wide = x.to(statistics_dtype(x))
    return F.gelu(wide + bias.to(wide.dtype)).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """d gelu(y)/dy = Phi(y) + y phi(y), y = x + bias."""
    dtype = statistics_dtype(x)
    y = x.to(dtype) + bias.to(dtype)
    grad_y = torch.ops.aten.gelu_backward(grad.to(dtype), y)
    return grad_y.to(x.dtype), grad_y.sum(0)
