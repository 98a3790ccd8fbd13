"""Strided sets of frames, and the prompt of each: that of its sample without the frames of other sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qts_video.dropin.layout import Layout


@dataclass(frozen=True)
class FrameSet:
    """Some frames of a sample's videos, and the prompt that holds no others. Host data only."""

    sample: int
    """The batch row."""
    columns: torch.Tensor
    """[n] int64, ascending: the columns of the sample that are this set's prompt."""
    videos: list[int]
    """Those that have a frame in this set."""
    rows: list[torch.Tensor]
    """Of each of them, [m] int64, ascending: its tokens in this set, as rows of the packed video axis."""
    places: list[torch.Tensor]
    """Of each of them, [m] int64, ascending: where these tokens are in ``columns``."""


def count_sets(steps: Sequence[int], frames_per_set: int) -> int:
    """The smallest number K of strided sets with at most ``frames_per_set`` time steps each, of videos with ``steps``.

    Set k has steps k, k + K, k + 2K, ... of every video, so set 0 is the largest, with sum ceil(steps / K).

    Raises:
        ValueError: there are more videos than ``frames_per_set``.
    """
    if frames_per_set < len(steps):
        raise ValueError(
            f"a set holds a frame of every video of a sample: expected frames_per_set of at least {len(steps)}, got "
            f"{frames_per_set}"
        )
    number = 1
    while sum(-(-t // number) for t in steps) > frames_per_set:
        number += 1
    return number


def split_frames(layout: "Layout", frames_per_set: int, left_out: torch.Tensor | None = None) -> list[FrameSet]:
    """The strided sets of every sample that has a video, sample after sample.

    A prompt keeps all text, images, and the tags and newlines of its own frames; the one newline of a whole video
    stays in every set.

    Args:
        layout: where the videos are.
        frames_per_set: most time steps in a set, over all videos of a sample.
        left_out: [B, L] bool on the CPU, columns that no prompt has.

    Raises:
        ValueError: a sample has more videos than ``frames_per_set``.
    """
    tokens = layout.rows.split(layout.lengths)
    starts = torch.tensor([0, *layout.lengths]).cumsum(0).tolist()
    newlines = layout.newline_rows.split(layout.newlines)
    sets = []
    for sample in sorted(set(layout.sample)):
        videos = [video for video, of in enumerate(layout.sample) if of == sample]
        number = count_sets([layout.grids[video][0] for video in videos], frames_per_set)
        owner = torch.full((layout.columns,), -1)  # the set of every column; -1: all of them
        for video in videos:
            spans = layout.frame_spans[video]
            step_owner = torch.arange(len(spans)) % number
            owner[int(spans[0, 0]) : int(spans[-1, 1])] = step_owner.repeat_interleave(spans[:, 1] - spans[:, 0])
            if layout.newline_spans[video] == layout.lengths[video]:
                owner[newlines[video] % layout.columns] = -1
        there = layout.valid[sample] if left_out is None else layout.valid[sample] & ~left_out[sample]
        for number_of_set in range(number):
            columns = (there & ((owner == -1) | (owner == number_of_set))).nonzero().squeeze(1)
            here, rows, places = [], [], []
            for video in videos:
                column = tokens[video] % layout.columns
                row = (owner[column] == number_of_set).nonzero().squeeze(1)
                if len(row):
                    here.append(video)
                    rows.append(row + starts[video])
                    places.append(torch.searchsorted(columns, column[row]))
            if here:  # behind another method, a set's frames may have no token left
                sets.append(FrameSet(sample, columns, here, rows, places))
    return sets


def set_positions(
    position_ids: torch.Tensor | None,
    sample: torch.Tensor,
    columns: torch.Tensor,
    positions_carry_time: bool,
) -> torch.Tensor:
    """Position ids of prompts made of some columns of a prefill.

    Where positions carry absolute time (Qwen2.5-VL) every token keeps its own. Elsewhere the gaps that frames of other
    sets leave are closed: behind a jump from column c to column d, positions are less by p[d] - p[c + 1]. That is exact
    where what starts a frame and what follows it have 1-D positions (text, tags, or all tokens).

    Args:
        position_ids: [B, L], [3, B, L] (time, height, width) or [4, B, L] (text positions first) of the whole prefill,
            B or 1 rows; None: columns are counted, padding too.
        sample: [R] int64 on the device, the sample of each prompt.
        columns: [R, K] int64 on the device, its columns, -1 in padding at the end.
        positions_carry_time: see ``Adapter.positions_carry_time``.

    Returns:
        [R, K]; or [4, R, K], text positions first and without gaps, which keeps gapped rotary positions from being
        taken for packed sequences.
    """
    prompts, length = columns.shape
    counted = torch.arange(length, device=columns.device).expand(prompts, -1)
    if position_ids is None:
        return columns[:, :1] + counted
    rotary = position_ids[-3:] if position_ids.ndim == 3 else position_ids.unsqueeze(0)
    if rotary.shape[1] > 1:
        rotary = rotary.index_select(1, sample.to(rotary.device))
    rotary = rotary.expand(-1, prompts, -1)
    index = columns.to(rotary.device).clamp(min=0).expand(len(rotary), -1, -1)
    gathered = rotary.gather(2, index)
    if not positions_carry_time:
        # Padding jumps back to column 0; what comes of it is never read.
        behind = (index[..., :-1] + 1).clamp(max=rotary.shape[2] - 1)
        gaps = gathered[..., 1:] - rotary.gather(2, behind)
        gathered = torch.cat([gathered[..., :1], gathered[..., 1:] - gaps.cumsum(2)], 2)
    if position_ids.ndim == 2:
        return gathered[0]
    return torch.cat([counted.unsqueeze(0).to(gathered), gathered])
