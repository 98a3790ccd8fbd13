"""A prefill without the video tokens that a method dropped, for the method behind it."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qts_video.dropin.checks import Kept
from qts_video.dropin.layout import Layout
from qts_video.dropin.shorten import Columns, kept_columns

if TYPE_CHECKING:
    from qts_video.dropin.prefill import Prefill


def shorten_prefill(prefill: "Prefill", kept: Kept, tokens: torch.Tensor | None) -> "Prefill":
    """The prefill of the columns that stay, at the positions that they had. One synchronisation, for its layout.

    Args:
        prefill: of all columns.
        kept: what stays of its videos.
        tokens: [N, D] re-encoded rows that take the place of the kept ones, or None.
    """
    columns = kept_columns(prefill.layout, kept)
    embeds = columns.gather_tokens(prefill.inputs_embeds)
    if tokens is not None:
        embeds = embeds.flatten(0, 1).index_copy(0, columns.kept_rows, tokens).view_as(embeds)
    positions = prefill.position_ids
    if positions is None:  # a decoder counts by itself
        positions = torch.arange(prefill.layout.columns, device=embeds.device).unsqueeze(0)
    positions = columns.gather(positions.expand(*positions.shape[:-2], *prefill.input_ids.shape))
    mask = prefill.attention_mask
    if mask is not None:
        past = mask[:, : mask.shape[1] - prefill.layout.columns]
        mask = torch.cat([past, columns.mask.to(mask)], 1)
    elif columns.padded:
        mask = columns.mask.long()
    sample = torch.arange(len(embeds), device=embeds.device) * prefill.copies
    inputs = {
        **prefill.decoder_inputs,
        **prefill.adapter.gather_extras(prefill.decoder_inputs, sample, columns.source),
        "inputs_embeds": embeds,
        "position_ids": positions,
        "attention_mask": mask,
    }
    layout, find_place = _shorten_layout(prefill.layout, kept, columns)
    return replace(
        prefill,
        layout=layout,
        input_ids=columns.gather(prefill.input_ids),
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        find_question=lambda video: find_place(layout.sample[video], prefill.find_question(video)),
        decoder_inputs=inputs,
        copies=1,
        vision=None,
    )


def _shorten_layout(
    layout: Layout, kept: Kept, columns: Columns
) -> tuple[Layout, Callable[[int, torch.Tensor], torch.Tensor]]:
    """The layout of the columns that stay, and what tells where a sample's column has gone: of one that stayed its new
    place, of another that of the next one that did."""
    length = columns.source.shape[1]
    flat = torch.cat([columns.source.flatten(), columns.kept_rows]).cpu()
    source, rows = flat[: columns.source.numel()].view(-1, length), flat[columns.source.numel() :]
    stays = [row[row >= 0] for row in source]
    first = [int((row >= 0).int().argmax()) for row in source]

    def find_place(sample: int, column: torch.Tensor) -> torch.Tensor:
        return torch.searchsorted(stays[sample], column.contiguous()) + first[sample]

    # A row or a frame that lost tokens is no span of equal length, so that its newline belongs to its time step alone.
    spans, behind = [], []
    of_video = zip(
        layout.newline_rows.split(layout.newlines),
        layout.newline_spans,
        layout.lengths,
        kept.counts,
        layout.sample,
        strict=True,
    )
    for newline, span, before, count, sample in of_video:
        whole = 0 < span == before and count > 0
        spans.append(count if whole else 0)
        if whole:
            behind.append(find_place(sample, newline % layout.columns) + sample * length)
    shortened = Layout(
        input_ids=layout.input_ids.gather(1, source.clamp(min=0)),
        valid=source >= 0,
        rows=rows,
        grids=layout.grids,
        lengths=kept.counts,
        sample=layout.sample,
        frame_spans=[find_place(s, span) for span, s in zip(layout.frame_spans, layout.sample, strict=True)],
        newline_rows=torch.cat(behind) if behind else layout.newline_rows[:0],
        newline_spans=spans,
        step_seconds=layout.step_seconds,
    )
    return shortened, find_place
