"""What a prompt says of time steps that keep no token: their tags, and their times in a list."""

from typing import Any

import torch

from qts_video.dropin.layout import Layout
from qts_video.dropin.time_list import find_lost_times


def step_of_tokens(layout: Layout) -> torch.Tensor:
    """[sum M] int64: the time step of each video token, counted over all videos."""
    steps, before = [], 0
    for rows, spans in zip(layout.rows.split(layout.lengths), layout.frame_spans, strict=True):
        steps.append(before + torch.searchsorted(spans[:, 1].contiguous(), rows % layout.columns, right=True))
        before += len(spans)
    return torch.cat(steps)


def lost_columns(layout: Layout, kept_steps: list[bool], tokenizer: Any | None) -> tuple[torch.Tensor, list[str]]:
    """Which columns go with the time steps that keep no token, besides their tokens and newlines.

    Those are the tags around them (``Layout.frame_spans``), and with a tokenizer their times in a written list
    (``find_lost_times``). What stands around a step together with other pictures stays.

    Args:
        layout: of the prefill.
        kept_steps: of each time step of each video, whether it keeps a token.
        tokenizer: the model's, or None.

    Returns:
        [B, L] bool, and notes for the report.
    """
    lost, notes = torch.zeros_like(layout.valid), []
    first, stays = 0, [[] for _ in range(layout.batch)]
    own = torch.zeros_like(layout.valid)
    own.view(-1)[torch.cat([layout.rows, layout.newline_rows])] = True
    for sample, spans in zip(layout.sample, layout.frame_spans, strict=True):
        kept = kept_steps[first : first + len(spans)]
        first += len(spans)
        for start, stop in _spans_to_drop(layout.input_ids[sample], own[sample], spans, kept):
            lost[sample, start:stop] = True
        # A method behind another is given steps that are gone already, from the list too.
        stays[sample].append([stay for stay, (start, stop) in zip(kept, spans.tolist(), strict=True) if start < stop])
    if tokenizer is not None:
        for sample in range(layout.batch):
            if stays[sample]:
                vision = own[sample] | ~layout.valid[sample]
                times, of_sample = find_lost_times(layout.input_ids[sample], vision, tokenizer, stays[sample])
                lost[sample] |= times
                notes += [f"sample {sample}: {note}" if layout.batch > 1 else note for note in of_sample]
    return lost, notes


def _spans_to_drop(
    ids: torch.Tensor, own: torch.Tensor, spans: torch.Tensor, kept: list[bool]
) -> list[tuple[int, int]]:
    """Columns from and to, of the steps of a video that keep no token. ``own`` [L] bool: tokens of videos."""
    dropped = []
    placeholder = ids[own][:1]
    for (start, stop), stay in zip(spans.tolist(), kept, strict=True):
        if not stay and not bool(((ids[start:stop] == placeholder) & ~own[start:stop]).any()):
            dropped.append((start, stop))
    left = [n for n, stay in enumerate(kept) if stay]
    if left and left[0] > 0:
        # What separates the first that stays from the one before goes too: the tags of a first step start without it.
        opening, (start, stop) = ids[spans[0, 0]], spans[left[0]].tolist()
        lead = ids[start : start + int(own[start:stop].int().argmax())]
        same = (lead == opening).nonzero().squeeze(1)
        if len(same) and int(spans[0, 0]) + 1 < int(spans[0, 1]) and not bool(own[spans[0, 0]]):
            dropped.append((start, start + int(same[0])))
    return dropped
