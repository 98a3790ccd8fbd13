"""Repeated bipartite soft matching in eager PyTorch: the specification."""

from itertools import pairwise

import torch
from torch import Tensor

from qts_kernels._schemas import statistics_dtype


def merge_tokens(
    frames: Tensor, counts: Tensor, cu_seqlens: Tensor, sizes: Tensor | None, total: int, compat: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``qts_kernels.merge_tokens`` for the rule and ``_schemas`` for the shapes."""
    x = frames.to(statistics_dtype(frames))
    sizes = x.new_ones(x.shape[:2]) if sizes is None else sizes
    rows = torch.full(x.shape[:2], -1, dtype=torch.int64, device=x.device)
    shares = torch.zeros_like(sizes)
    merged_tokens, merged_sizes = x.new_zeros(total, x.shape[2]), sizes.new_zeros(total)
    for t, (count, (start, stop)) in enumerate(zip(counts.tolist(), pairwise(cu_seqlens.tolist()), strict=True)):
        if start == stop:
            continue
        slot, share = _merge(x[t], sizes[t], count, compat)
        kept = slot < stop - start  # a frame that reaches behind the last row is cut there
        rows[t] = torch.where(kept, slot + start, -1)
        shares[t] = torch.where(kept, share, 0)
        merged_tokens.index_add_(0, rows[t][kept], x[t][kept] * share[kept, None])
        merged_sizes.index_add_(0, rows[t][kept], sizes[t][kept])
    return merged_tokens.to(frames.dtype), merged_sizes, rows, shares


def _merge(x: Tensor, sizes: Tensor, count: int, compat: bool) -> tuple[Tensor, Tensor]:
    """The slot of each token among the ``count`` that are left, and its weight in the mean there."""
    slot, share, weights = torch.arange(len(x), device=x.device), torch.ones_like(sizes), sizes
    while len(x) > count:
        target, left = _match(x, min(len(x) // 2, len(x) - count), compat)
        x, weights, factor = _average(x, weights, target, left)
        if compat:
            weights = torch.ones_like(weights)
        share *= factor[slot]
        slot = target[slot]
    return slot, share


def _match(x: Tensor, merged: int, compat: bool) -> tuple[Tensor, int]:
    """The slot that each token goes to in one round, and how many slots are left."""
    norm = x.norm(dim=1)
    unit = x * torch.where(norm > 0, 1 / norm, 0)[:, None]
    similarity = unit[0::2] @ unit[1::2].t()
    similarity.masked_fill_(similarity.isnan(), -torch.inf)
    best = similarity.argmax(1)  # the first of equal ones
    order = similarity.gather(1, best[:, None])[:, 0].argsort(descending=True, stable=True)
    stays = torch.ones(len(x), dtype=torch.bool, device=x.device)
    stays[2 * order[:merged]] = False
    target = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if compat:  # what stays of the even positions, by falling similarity, then the odd ones
        target[2 * order[merged:]] = torch.arange(len(order) - merged, device=x.device)
        target[1::2] = torch.arange(len(x) // 2, device=x.device) + len(order) - merged
    else:
        target[stays] = torch.arange(len(x) - merged, device=x.device)
    gone = 2 * order[:merged]
    target[gone] = target[2 * best[order[:merged]] + 1]
    return target, len(x) - merged


def _average(x: Tensor, weights: Tensor, target: Tensor, left: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted means of the tokens of each slot, the sums of their weights, and each token's weight in its mean."""
    whole = weights.new_zeros(left).index_add_(0, target, weights)
    factor = weights / whole[target]
    return x.new_zeros(left, x.shape[1]).index_add_(0, target, x * factor[:, None]), whole, factor
