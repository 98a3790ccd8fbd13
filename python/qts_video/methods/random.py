"""Random selection: a seeded draw without replacement, blind to the question. The other control."""

import torch

from qts_kernels import Selection
from qts_video.methods.base import Videos, check_budget
from qts_video.methods.budget import fit_ordered, newline_spans, resolve_budgets
from qts_video.methods.uniform import packed_selection


class Random:
    """Keep n tokens of each video, drawn uniformly without replacement; n = ``resolve_budget(M, ...)``.

    The draw is the first n entries of one permutation of the video's M tokens that depends on ``seed`` and M
    alone: the same on every call and device, and whatever else is in the batch (so that the copies of a
    sample that beam search makes keep the same tokens). A smaller budget keeps a subset of a larger one's
    tokens. Both bounds None keeps everything.

    A newline token stays with the tokens of its row or frame, and counts: of a video with N newlines, the bounds are
    those of its M + N tokens, and as many entries are kept as fit together with their newlines, at least 1.

    Args:
        retention_ratio: share of each video's tokens to keep, in (0, 1].
        max_tokens: most tokens to keep of each video.
        seed: of torch's CPU generator.

    Raises:
        ValueError: retention_ratio outside (0, 1], or max_tokens below 1.
    """

    name = "random"
    needs_question = False

    def __init__(self, retention_ratio: float | None = None, max_tokens: int | None = None, *, seed: int = 0) -> None:
        check_budget(retention_ratio, max_tokens)
        self.retention_ratio = retention_ratio
        self.max_tokens = max_tokens
        self.seed = seed

    def select(self, videos: Videos) -> Selection:
        """See ``Selector.select``. The selection has no scores and no re-encoded tokens."""
        drawn, counts, start = [], [], 0
        budgets = resolve_budgets(videos, self.retention_ratio, self.max_tokens)
        for length, span, budget in zip(videos.lengths, newline_spans(videos), budgets, strict=True):
            order = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed))
            n = fit_ordered(order, span, budget)
            drawn.append(order[:n].sort().values + start)
            counts.append(n)
            start += length
        return packed_selection(torch.cat(drawn), counts, videos.tokens.device)

    def __repr__(self) -> str:
        return f"Random(retention_ratio={self.retention_ratio}, max_tokens={self.max_tokens}, seed={self.seed})"
