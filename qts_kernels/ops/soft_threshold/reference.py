"""Soft threshold in eager PyTorch: the specification."""

from itertools import pairwise

import torch
from torch import Tensor

ITERATIONS = 60


def soft_threshold(scores: Tensor, rho: Tensor, cu_seqlens: Tensor, tau: float) -> Tensor:
    """See ``qts_kernels.soft_threshold``. Works in float64: bisection by halves down to the last bit of fp32."""
    out = torch.zeros_like(rho)
    offsets = cu_seqlens.tolist()
    for s, (start, stop) in enumerate(pairwise(offsets)):
        if start == stop:
            continue
        r, target = scores[start:stop].double(), rho[s].double()
        # With t = min(r) - tau logit(rho) every term is at least rho, with max(r) at most: the root lies between.
        shift = tau * torch.logit(target)
        low, high = r.min() - shift, r.max() - shift
        for _ in range(ITERATIONS):
            middle = (low + high) / 2
            above = torch.sigmoid((r - middle) / tau).mean() > target
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        out[s] = torch.where(r.isfinite().all(), (low + high) / 2, torch.nan)
    return out
