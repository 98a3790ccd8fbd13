"""Budgets of videos with newline tokens: a newline stays where a token of its span does, and takes a place. Host
arithmetic only.

A span is the run of tokens that share a newline: a row, a frame, or the whole video (``Videos.newline_spans``).
"""

import torch

from qts_video.methods.base import Videos, resolve_budget


def resolve_budgets(videos: Videos, retention_ratio: float | None, max_tokens: int | None) -> list[int]:
    """``resolve_budget`` of each video's tokens, its newlines included."""
    totals = [length + count for length, count in zip(videos.lengths, count_newlines(videos), strict=True)]
    return [resolve_budget(total, retention_ratio, max_tokens) for total in totals]


def newline_spans(videos: Videos) -> list[int]:
    """Tokens of a span of each video, 0 where it has no newlines."""
    return videos.newline_spans or [0] * len(videos.lengths)


def count_newlines(videos: Videos) -> list[int]:
    """Newlines of each video."""
    spans = zip(videos.lengths, newline_spans(videos), strict=True)
    return [length // span if span else 0 for length, span in spans]


def fit_spaced(budget: int, newlines: int) -> int:
    """How many evenly spaced tokens of a video with that many ``newlines`` the ``budget`` allows, at least 1.

    k evenly spaced tokens touch min(k, newlines) spans: as long as they are a span or more apart, each is in a span of
    its own; from there on, every span holds one. So this is the largest k with k + min(k, newlines) <= budget.
    """
    return max(budget - newlines, budget // 2, min(budget, 1))


def fit_ordered(order: torch.Tensor, span: int, budget: int) -> int:
    """How many tokens the ``budget`` allows, taken in ``order`` [M] int64 (a permutation of a video's tokens), at least
    1: as many as there is room for with the newlines of their spans of ``span`` tokens (0: no newlines)."""
    if span == 0:
        return budget
    of_token, place = order // span, torch.arange(len(order))
    first = torch.full((len(order) // span,), len(order)).scatter_reduce(0, of_token, place, "amin")
    cost = place + 1 + (first[of_token] == place).cumsum(0)
    return max(int((cost <= budget).sum()), min(budget, 1))
