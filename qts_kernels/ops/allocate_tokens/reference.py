"""Largest remainder with caps in eager PyTorch: the specification."""

from itertools import pairwise

import torch
from torch import Tensor

# Totals end up in int32 cu_seqlens.
MAX_TOTAL = 2**31 - 1


def allocate_tokens(weights: Tensor, cu_seqlens: Tensor, total: Tensor, cap: Tensor | None) -> Tensor:
    """See ``qts_kernels.allocate_tokens``."""
    weights = torch.where(weights.isfinite() & (weights > 0), weights, 0.0)
    counts = torch.zeros_like(weights, dtype=torch.int64)
    for s, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        if start < stop:
            caps = None if cap is None else cap[start:stop]
            counts[start:stop] = _allocate(weights[start:stop], max(0, min(int(total[s]), MAX_TOTAL)), caps)
    return counts


def _allocate(weights: Tensor, left: int, cap: Tensor | None) -> Tensor:
    cap = torch.full_like(weights, left, dtype=torch.int64) if cap is None else cap.clamp(0, left)
    counts, sharing = cap.clone(), torch.ones_like(weights, dtype=torch.bool)
    left = min(left, int(cap.sum()))
    while sharing.any():
        share, remainder = _divide(left, _integers(weights[sharing]))
        bound = share >= cap[sharing]
        if not bound.any():
            order = remainder.argsort(descending=True, stable=True)
            share[order[: left - int(share.sum())]] += 1
            counts[sharing] = share
            break
        left -= int(cap[sharing][bound].sum())
        sharing[sharing.clone()] = ~bound
    return counts


def _integers(weights: Tensor) -> Tensor:
    """The weights as integers of up to 53 bits, all scaled by one power of two; ones where all are zero."""
    bits = weights.view(torch.int64)
    exponent = bits >> 52
    mantissa = bits & ((1 << 52) - 1) | (exponent > 0).long() << 52
    exponent = exponent.clamp(min=1)  # a subnormal number has the smallest normal one's, and no leading bit
    # The sum of the integers stays below 2^61.
    spare = max(0, (len(weights) - 1).bit_length() - 8)
    integers = mantissa >> (exponent.max() - exponent + spare).clamp(max=63)
    return integers if integers.any() else torch.ones_like(integers)


def _divide(left: int, integers: Tensor) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of left * integers by the sum of the integers: exact, though the product has 84 bits."""
    whole = integers.sum()
    share = (left * integers.double() / whole.double()).long()  # off by one at most: left is below 2^31
    remainder = left * integers - share * whole  # the products wrap modulo 2^64, which the difference does not see
    below, above = remainder < 0, remainder >= whole
    share = share - below.long() + above.long()
    return share, remainder + torch.where(below, whole, 0) - torch.where(above, whole, 0)
