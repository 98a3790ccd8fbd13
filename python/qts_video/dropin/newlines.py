"""Newline tokens, which some models put behind the rows or frames of a video: they go where their tokens go."""

import torch

from qts_video.dropin.layout import Layout


def kept_newlines(layout: Layout, indices: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which newlines stay: those with a kept token in their span, and the one of a whole video always.

    Args:
        layout: of the prefill.
        indices: [N] int64 on the model's device: the selected rows of the packed video axis, -1 in padding.
        cu_seqlens: [V+1] int32, the videos' offsets on that axis.

    Returns:
        kept [sum N] bool and how many of them are of each video, [V] int64; on the device, nothing synchronises.
    """
    device, number = indices.device, len(layout.lengths)
    counts = torch.tensor(layout.newlines)
    video = torch.repeat_interleave(torch.arange(number), counts).to(device)
    spans = torch.tensor(layout.newline_spans)
    kept = (spans == torch.tensor(layout.lengths)).to(device)[video]
    if len(kept):
        spans, offsets = spans.to(device), (counts.cumsum(0) - counts).to(device)
        of_video = torch.searchsorted(cu_seqlens[1:].long(), indices, right=True).clamp(max=number - 1)
        span = spans[of_video]
        newline = offsets[of_video] + (indices - cu_seqlens[of_video]) // span.clamp(min=1)
        used = (indices >= 0) & (span > 0) & (newline >= 0) & (newline < len(kept))
        hit = torch.zeros(len(kept) + 1, dtype=torch.bool, device=device)
        hit.index_fill_(0, newline.where(used, len(kept)), True)
        kept = kept | hit[:-1]
    return kept, torch.zeros(number, dtype=torch.int64, device=device).index_add_(0, video, kept.long())
