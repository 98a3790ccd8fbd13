"""How a budget is shared among the videos of a sample and the sets of a video, and what is kept of each."""

from collections.abc import Sequence

import torch

import qts_kernels


def share(budget: int, sizes: Sequence[int]) -> list[int]:
    """``budget`` in whole shares in proportion to ``sizes``, by largest remainder (the first of equal ones).

    The shares sum to min(budget, sum(sizes)), and none is above its size: a share that is rounded up was no whole
    number below its size.
    """
    total = sum(sizes)
    budget = min(budget, total)
    if total == 0:
        return [0] * len(sizes)
    shares = [budget * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(budget * sizes[i] % total))
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return shares


def best_of_segments(scores: torch.Tensor, segments: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """The ``counts[s]`` best rows of each segment, exactly (score descending, row ascending).

    Args:
        scores: [M] float32.
        segments: of each, [m] int64 on the CPU, ascending: its rows of ``scores``.
        counts: how many to keep of each, at most m.

    Returns:
        [sum counts] int64 on the device of ``scores``, ascending over all segments. Nothing synchronises.
    """
    rows = torch.cat(list(segments)).to(scores.device)
    n = torch.tensor(counts).to(scores.device)
    lengths = torch.tensor([len(segment) for segment in segments])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(scores.device, torch.int32)
    best, _ = qts_kernels.topn(scores.index_select(0, rows), n, cu_seqlens=cu_seqlens, max_n=max(counts))
    return rows.index_select(0, best[: sum(counts)]).sort().values


def best_with_newlines(
    scores: torch.Tensor,
    segments: Sequence[torch.Tensor],
    lines: Sequence[torch.Tensor | None],
    budgets: Sequence[int],
    cu_seqlens: torch.Tensor,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best rows of each segment, as many as fit its budget together with one newline for every line they touch.

    A segment keeps the longest prefix of its ranking (score descending, row ascending) that fits. Where one token is
    left then, the best other row of a touched line takes it; where no such row is left either, it stays unused, since a
    row of another line costs two.

    Args:
        scores: [M] float32, at least 0, or NaN, which ranks last.
        segments: of each, [m] int64 on the CPU, ascending: its rows of ``scores``.
        lines: of each, [m] int64 on the CPU, below M: equal for rows that share a newline, different otherwise. None:
            the segment has no newlines to count.
        budgets: rows and newlines to keep of each segment.
        cu_seqlens: [V+1] int32 on the device: offsets of the videos in ``scores``.
        most: no video keeps more rows than this.

    Returns:
        indices [N] int64, ascending in every video and -1 behind the last; cu_seqlens of the videos in it. On the
        device; nothing synchronises.
    """
    device, total = scores.device, len(scores)
    lengths = torch.tensor([len(segment) for segment in segments])
    rows = torch.cat(list(segments)).to(device)
    segment = torch.arange(len(segments)).repeat_interleave(lengths, output_size=len(rows)).to(device)
    line = torch.cat([s if of is None else of for s, of in zip(segments, lines, strict=True)]).to(device)
    charged = torch.tensor([of is not None for of in lines]).to(device)[segment]
    budget = torch.tensor(budgets).to(device)

    value = scores.index_select(0, rows)
    value = torch.where(value.isnan(), -torch.inf, value)
    rank = value.argsort(descending=True, stable=True)
    rank = rank[segment[rank].argsort(stable=True)]  # segment after segment, best first
    rows, line, charged = rows[rank], line[rank], charged[rank]  # the segments of the ranks are as before

    place = torch.arange(len(rank), device=device)
    first = torch.full((total,), len(rank), device=device).scatter_reduce(0, line, place, "amin")
    spent = (1 + (charged & (first[line] == place)).long()).cumsum(0)
    before = torch.nn.functional.pad(spent, (1, 0))[(lengths.cumsum(0) - lengths).to(device)]
    spent = spent - before[segment]
    keep = spent <= budget[segment]

    used = torch.zeros_like(budget).scatter_reduce(0, segment, spent * keep, "amax")
    touched = torch.zeros(total, dtype=torch.int64, device=device).scatter_reduce(0, line, keep.long(), "amax") > 0
    candidate = charged & ~keep & touched[line] & (used < budget)[segment]
    best = torch.full_like(budget, len(rank)).scatter_reduce(0, segment, place.where(candidate, len(rank)), "amin")
    keep = keep | (best[segment] == place)

    kept = torch.zeros(total, device=device).index_copy(0, rows, keep.float())
    n = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))[cu_seqlens.long()].diff()
    return qts_kernels.topn(kept, n, cu_seqlens=cu_seqlens, max_n=most)
