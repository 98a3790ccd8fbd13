"""Exact segmented Top-n in eager PyTorch: the specification."""

import torch
from torch import Tensor


def topn(scores: Tensor, cu_seqlens: Tensor, n: Tensor, max_n: int) -> tuple[Tensor, Tensor]:
    """See ``qts_kernels.topn`` for the order and ``_schemas`` for the shapes."""
    order = ordered_key(scores)
    offsets = cu_seqlens.tolist()
    rows = min((len(offsets) - 1) * max_n, scores.shape[0])
    kept, counts = [], [0]
    for start, stop, count in zip(offsets[:-1], offsets[1:], n.tolist(), strict=True):
        count = max(0, min(count, max_n, stop - start))
        best = order[start:stop].argsort(descending=True, stable=True)[:count]
        kept.append(best.sort().values + start)
        counts.append(counts[-1] + count)
    indices = torch.full((rows,), -1, dtype=torch.int64, device=scores.device)
    indices[: counts[-1]] = torch.cat(kept)
    return indices, torch.tensor(counts, dtype=torch.int32, device=scores.device)


def ordered_key(scores: Tensor) -> Tensor:
    """int32 keys that order fp32 scores: NaN below -inf, -0 equal to +0."""
    bits = (scores + 0.0).view(torch.int32)  # -0 + 0 is +0
    key = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return key.masked_fill(scores.isnan(), torch.iinfo(torch.int32).min)
