"""Uniform selection: evenly spaced tokens, blind to the question. The control every pruning paper needs."""

import torch

from qts_kernels import Selection
from qts_video.methods.base import Videos, check_budget
from qts_video.methods.budget import count_newlines, fit_spaced, resolve_budgets


class Uniform:
    """Keep evenly spaced tokens of each video's packed token axis.

    Of M tokens, n = ``resolve_budget(M, retention_ratio, max_tokens)`` are kept: the one in the middle of
    each of n equal stretches, index floor((2 i + 1) M / (2 n)) for i = 0 .. n-1. Integer arithmetic: exactly
    n distinct tokens, the same ones on every run and device. Both bounds None keeps everything.

    A newline token stays with the tokens of its row or frame, and counts: of a video with N newlines, the bounds are
    those of its M + N tokens, and n is the largest number of tokens that fits together with its newlines, at least 1.

    Args:
        retention_ratio: share of each video's tokens to keep, in (0, 1].
        max_tokens: most tokens to keep of each video.

    Raises:
        ValueError: retention_ratio outside (0, 1], or max_tokens below 1.
    """

    name = "uniform"
    needs_question = False

    def __init__(self, retention_ratio: float | None = None, max_tokens: int | None = None) -> None:
        check_budget(retention_ratio, max_tokens)
        self.retention_ratio = retention_ratio
        self.max_tokens = max_tokens

    def select(self, videos: Videos) -> Selection:
        """See ``Selector.select``. The selection has no scores and no re-encoded tokens."""
        budgets = resolve_budgets(videos, self.retention_ratio, self.max_tokens)
        counts = [fit_spaced(*video) for video in zip(budgets, count_newlines(videos), strict=True)]
        # Counts and lengths live on the host, so the indices are made there and copied over once: no
        # synchronisation.
        n, length = torch.tensor(counts), torch.tensor(videos.lengths)
        segment = torch.repeat_interleave(torch.arange(len(counts)), n)
        rank = torch.arange(len(segment)) - (n.cumsum(0) - n)[segment]
        indices = (2 * rank + 1) * length[segment] // (2 * n[segment]) + (length.cumsum(0) - length)[segment]
        return packed_selection(indices, counts, videos.tokens.device)

    def __repr__(self) -> str:
        return f"Uniform(retention_ratio={self.retention_ratio}, max_tokens={self.max_tokens})"


def packed_selection(indices: torch.Tensor, counts: list[int], device: torch.device) -> Selection:
    """A Selection on ``device`` from indices [N] int64 and counts [V] that were decided on the host."""
    n = torch.tensor(counts)
    cu_seqlens = torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(torch.int32)
    return Selection(indices=indices.to(device), cu_seqlens=cu_seqlens.to(device), n=n.to(device))
