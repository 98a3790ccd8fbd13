"""Videos whose frames stand in a prompt as numbered images: "Frame1: <img>...</img>\\nFrame2: <img>...</img>"."""

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

_LABEL = re.compile(r"Frame[- ]?(\d+)\s*:\s*<img>\s*$")
_LONGEST_LABEL = 16  # tokens: a digit is one of its own
_LONGEST_GAP = 12
_LONGEST_NUMBER = 4
_LONGEST_FIRST_NUMBER = 2


@dataclass(frozen=True)
class Frames:
    """A video in one sample."""

    label: int
    """The column where the label of its first frame starts."""
    starts: list[int]
    """Of each frame, the column of its first placeholder."""


def find_frames(
    ids: torch.Tensor, image_token_id: int, tile: int, tokenizer: Any | None, turn_start: int | None
) -> list[Frames]:
    """Tell the frames of videos from images.

    With a tokenizer, by what stands in front: a tile behind ``Frame1: <img>`` (or ``Frame-1``, ``Frame 1``) is a frame.
    Frames whose numbers rise are one video; a number that does not, or another turn, starts the next.

    Without one, by structure, which is a guess: a video is at least two successive tiles of one turn with at most 12
    tokens between them, and those the same everywhere but for a number between two tokens that stay the same; the
    tokens in front of the first tile must be like them. A video of one frame is taken for an image, and images that
    are numbered like frames ("Image-1: <img>") are taken for a video. Give a tokenizer to be sure.

    Args:
        ids: [L] int64 on the CPU, one sample.
        image_token_id: the placeholder, of frames and images.
        tile: placeholders of a frame.
        tokenizer: of the model, or None.
        turn_start: the id that opens a turn of the chat, where it is known.

    Raises:
        ValueError: an image with the label of a frame is not one tile.
    """
    is_image = torch.nn.functional.pad(ids == image_token_id, (1, 1)).to(torch.int8).diff()
    starts, stops = (is_image == 1).nonzero().flatten(), (is_image == -1).nonzero().flatten()
    runs = list(zip(starts.tolist(), stops.tolist(), strict=True))
    if tokenizer is not None:
        return _by_label(ids.tolist(), runs, tile, tokenizer, turn_start)
    return _by_structure(ids.tolist(), runs, tile, turn_start)


def _by_label(
    ids: list[int], runs: list[tuple[int, int]], tile: int, tokenizer: Any, turn_start: int | None
) -> list[Frames]:
    videos: list[Frames] = []
    before, last, number = 0, 0, 0  # the end of the run before, and of the frame before; its number
    for start, stop in runs:
        floor, before = max(before, start - _LONGEST_LABEL), stop
        label = _LABEL.search(tokenizer.decode(ids[floor:start]))
        if label is None:
            continue
        if stop - start != tile:
            raise ValueError(
                f"expected {tile} placeholders behind {label[0]!r}, one tile a frame, got {stop - start}: cut frames "
                "into one tile each (max_num=1), and call no other images frames"
            )
        if not videos or int(label[1]) <= number or turn_start in ids[last:start]:
            candidates = range(start - 1, floor - 1, -1)
            first = next(column for column in candidates if _LABEL.search(tokenizer.decode(ids[column:start])))
            videos.append(Frames(first, []))
        videos[-1].starts.append(start)
        last, number = stop, int(label[1])
    return videos


def _by_structure(ids: list[int], runs: list[tuple[int, int]], tile: int, turn_start: int | None) -> list[Frames]:
    videos, index = [], 0
    while index < len(runs):
        video = _first_video(ids, runs[index:], runs[index - 1][1] if index else 0, tile, turn_start)
        if video is not None:
            videos.append(video)
        index += 1 if video is None else len(video.starts)
    return videos


def _first_video(
    ids: list[int], runs: list[tuple[int, int]], floor: int, tile: int, turn_start: int | None
) -> Frames | None:
    """The video that starts with the first of ``runs``; ``floor``: where the run before them ends."""
    if runs[0][1] - runs[0][0] != tile:
        return None
    starts, lead, gap = [runs[0][0]], 0, ids[max(floor, runs[0][0] - _LONGEST_GAP) : runs[0][0]]
    for (_, stop), (start, end) in pairwise(runs):
        previous, gap = gap, ids[stop:start]
        if end - start != tile or len(gap) > _LONGEST_GAP or turn_start in gap:
            break
        if len(starts) == 1:
            lead = _label_length(previous, gap)
            if lead == 0:
                break
        elif not _alike(previous, gap) or gap[-lead:] == ids[starts[0] - lead : starts[0]]:  # the latter: a restart
            break
        starts.append(start)
    return Frames(starts[0] - lead, starts) if len(starts) > 1 else None


def _label_length(before: list[int], gap: list[int]) -> int:
    """How many tokens at the end of ``before`` are a label like the one at the end of ``gap``, but for its number; 0:
    none. The first token of ``gap`` closes an image."""
    same = _common(before[::-1], gap[:0:-1])
    if same == 0:
        return 0
    lengths = range(1, _LONGEST_FIRST_NUMBER + 1)
    for ours, theirs in sorted(((a, b) for a in lengths for b in lengths), key=sum):
        words = _common(before[::-1][same + ours :], gap[:0:-1][same + theirs :])
        if words > 0:
            return same + ours + words
    return 0


def _alike(before: list[int], gap: list[int]) -> bool:
    """Whether two gaps between frames are the same but for a number."""
    head = _common(before, gap)
    tail = _common(before[head:][::-1], gap[head:][::-1])
    numbers = len(before) - head - tail, len(gap) - head - tail
    return head > 1 and tail > 0 and min(numbers) > 0 and max(numbers) <= _LONGEST_NUMBER


def _common(a: list[int], b: list[int]) -> int:
    """How many first elements are the same."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
