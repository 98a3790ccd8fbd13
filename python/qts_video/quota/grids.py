"""How many tokens each frame gets, and the grid that they make. Host arithmetic only."""

from bisect import bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import torch

Size = tuple[int, int]


def grid_ladder(rows: int, columns: int) -> list[Size]:
    """Grids from nothing, (0, 0), by one row or one column at a time up to (rows, columns).

    The next grid is the one closer to the frame's own aspect; of two as close, the one with a column more. In a square
    frame: (1, 1), (1, 2), (2, 2), (2, 3), (3, 3), ...
    """
    ladder, a, b = [(0, 0)], 1, 1
    while (a, b) != (rows, columns):
        ladder.append((a, b))
        taller, wider = abs((a + 1) * columns - b * rows), abs(a * columns - (b + 1) * rows)
        if b == columns or (a < rows and taller < wider):
            a += 1
        else:
            b += 1
    return [*ladder, (rows, columns)]


def grid_cost(size: Size, newlines: str) -> int:
    """Tokens of a grid and of its newlines: "row", one behind each row; "frame", one behind the grid; or "none"."""
    a, b = size
    return a * b + {"row": a, "frame": min(a * b, 1), "none": 0}[newlines]


def merged_cost(tokens: int, rows: int, newlines: str) -> int:
    """The most that so many tokens of a frame take with their newlines, wherever they are in its ``rows``."""
    return tokens + {"row": min(tokens, rows), "frame": min(tokens, 1), "none": 0}[newlines]


def climb(
    shares: Sequence[int], costs: Sequence[Sequence[int]], last: Sequence[bool] | None = None
) -> tuple[list[int], int]:
    """The step of its ladder that each frame reaches, where what one can't use is handed on to others.

    Each frame takes the highest step that costs at most its share. What that leaves goes, one step at a time, to the
    frame whose share exceeds its cost by most (the first of equal ones), as long as it pays for that frame's next step.

    Args:
        shares: of each frame.
        costs: of each frame, those of its steps: they rise from 0.
        last: frames that are handed something only where all others can use no more.

    Returns:
        The steps, and what is left: less than the next step of any frame costs.
    """
    steps = [bisect_right(of_frame, share) - 1 for share, of_frame in zip(shares, costs, strict=True)]
    left = sum(shares) - sum(of_frame[step] for step, of_frame in zip(steps, costs, strict=True))
    last = [False] * len(shares) if last is None else last
    queue = [(last[i], costs[i][step] - shares[i], i) for i, step in enumerate(steps)]
    heapify(queue)
    while queue:
        behind, excess, i = heappop(queue)
        if steps[i] + 1 == len(costs[i]):
            continue
        price = costs[i][steps[i] + 1] - costs[i][steps[i]]
        if price <= left:  # else it never will be
            steps[i] += 1
            left -= price
            heappush(queue, (behind, excess + price, i))
    return steps, left


def grid_places(sizes: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    """The places of new grids, spread evenly over the old ones: row floor((i + 1/2) h / a), column
    floor((j + 1/2) w / b) for token (i, j) of a grid (a, b) in a frame (h, w).

    Args:
        sizes: [F, 2] int64 on the CPU, (a, b) of each frame, at most ``grids``.
        grids: [F, 2] int64 on the CPU, (h, w) of each frame.

    Returns:
        [sum a * b] int64: distinct rows of the packed axis of all frames' tokens, ascending.
    """
    counts, areas = sizes.prod(1), grids.prod(1)
    frame = torch.arange(len(sizes)).repeat_interleave(counts)
    rank = torch.arange(len(frame)) - (counts.cumsum(0) - counts)[frame]
    (a, b), (h, w) = sizes[frame].unbind(1), grids[frame].unbind(1)
    row, column = (2 * (rank // b) + 1) * h // (2 * a), (2 * (rank % b) + 1) * w // (2 * b)
    return (areas.cumsum(0) - areas)[frame] + row * w + column


def group_places(rows: torch.Tensor, total: int, width: int) -> torch.Tensor:
    """The places of merged tokens: of each, that of its token nearest to the middle of them all (the first of equal
    ones). Integer arithmetic: the same on every run and device.

    Args:
        rows: [F, N] int64, the merged token that each token of F frames went to; -1: none.
        total: merged tokens.
        width: columns of a frame's grid.

    Returns:
        [total] int64, distinct rows of the packed axis of all frames' tokens; ascending by frame, not within one.
    """
    frames, length = rows.shape
    device, everything = rows.device, frames * length
    place = torch.arange(length, device=device).expand(frames, -1).flatten()
    target = torch.where(rows < 0, total, rows).flatten()  # those that are nowhere go behind the last
    size = torch.zeros(total + 1, dtype=torch.int64, device=device).index_add_(0, target, torch.ones_like(target))
    distance = torch.zeros_like(target)
    for coordinate in (place // width, place % width):
        whole = torch.zeros_like(size).index_add_(0, target, coordinate)
        distance += (coordinate * size[target] - whole[target]) ** 2
    nearest = torch.full_like(size, torch.iinfo(torch.int64).max).scatter_reduce_(0, target, distance, "amin")
    candidate = torch.arange(everything, device=device).where(distance == nearest[target], everything)
    return torch.full_like(size, everything).scatter_reduce_(0, target, candidate, "amin")[:total]
