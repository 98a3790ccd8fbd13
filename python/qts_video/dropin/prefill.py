"""One prefill with videos: what the selector is given, and what the decoder is given instead of the whole
prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qts_kernels import Selection
from qts_video.adapters.base import Adapter
from qts_video.dropin.checks import Kept, check_selection
from qts_video.dropin.dropped import Dropped
from qts_video.dropin.empty_steps import lost_columns
from qts_video.dropin.layout import Layout
from qts_video.dropin.shorten import Columns
from qts_video.dropin.shortened import shorten_prefill
from qts_video.methods.base import Videos


@dataclass(frozen=True)
class Prefill:
    """The prefill that a selection is made for, as the decoder was about to see it: B samples, L columns.

    For methods that run the language model. Whatever a method runs on ``model`` while it selects is left
    alone.
    """

    model: nn.Module
    """The model that the selector is attached to."""
    adapter: Adapter
    """What is known of it."""
    layout: Layout
    """Where the videos are."""
    input_ids: torch.Tensor
    """[B, L] int64"""
    inputs_embeds: torch.Tensor
    """[B, L, D], with the vision embeddings in place."""
    position_ids: torch.Tensor | None
    """What the model passes to its decoder: for Qwen2.5-VL [3, B, L] or, with text positions first, [4, B, L]
    int64."""
    attention_mask: torch.Tensor | None
    """[B, P + L], P the length of the cache as the caller counts it; None where nothing is padded."""
    find_question: Callable[[int], torch.Tensor]
    """Of a video, the columns [Lq] int64 on the CPU of the question in its sample: the text of the last user turn.
    Raises ValueError where it can't be found."""
    decoder_inputs: Mapping[str, Any]
    """Everything that the model passes to its decoder, for B * ``copies`` samples."""
    copies: int = 1
    vision: torch.Tensor | None = None
    """What went into the projector (``adapter.vision_in_order``), for selectors with ``needs_vision = True``; else
    None."""
    tokenizer: Any | None = None
    """The tokenizer or processor that ``attach`` was given."""
    drops_empty_steps: bool = False
    """Whether the selector takes what the prompt says of a time step away with its last token."""

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.adapter.parts(self.model).decoder

    def take(self, sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        """Inputs of the decoder for prompts made of columns of this one, without positions, mask and cache.

        Args:
            sample: [R] int64, the sample of each prompt.
            columns: [R, K] int64, its columns; -1 is padding (and repeats column 0). Both on the model's device.

        Returns:
            ``inputs_embeds`` [R, K, D], and what else this model's decoder takes a column.
        """
        batch, length, width = self.inputs_embeds.shape
        rows = sample.unsqueeze(1) * length + columns.clamp(min=0)
        embeds = self.inputs_embeds.reshape(batch * length, width).index_select(0, rows.flatten())
        extras = self.adapter.gather_extras(self.decoder_inputs, sample * self.copies, columns)
        return {"inputs_embeds": embeds.view(*columns.shape, width), **extras}

    def shortened(self, selection: Selection, videos: Videos, name: str) -> "tuple[Prefill, list[int]]":
        """This prefill without what the method ``name`` dropped, and how many tokens it kept of each of ``videos``.
        Waits for the selection. Vision features are not among what is left.

        Raises:
            TypeError, ValueError: it is no selection of these videos.
        """
        kept = self.check(selection, videos, name)
        tokens = None if selection.tokens is None else selection.tokens[: len(kept.indices)]
        return shorten_prefill(self, kept, tokens), kept.counts

    def check(self, selection: Selection, videos: Videos, name: str) -> Kept:
        """What the method ``name`` keeps of ``videos``, and what else goes. Waits for the selection, once.

        Raises:
            TypeError, ValueError: it is no selection of these videos.
        """
        kept = check_selection(selection, videos, self.layout, name, ask_steps=self.drops_empty_steps)
        if kept.steps is None or all(kept.steps):
            return kept
        tokenizer = getattr(self.tokenizer, "tokenizer", self.tokenizer)
        lost, notes = lost_columns(self.layout, kept.steps, tokenizer)
        return replace(kept, lost=lost, notes=tuple(notes))


@dataclass
class Call:
    """A forward call that holds videos, from its start to its end."""

    opened_by: nn.Module | None
    """The module whose forward it is; None where generate() runs the decoder without one."""
    input_ids: torch.Tensor
    """[B, L], without the copies of a sample."""
    layout: Layout
    copies: int
    """How often generate() repeated every sample, for beams or several sequences: row by row, before the prefill.
    A sample is selected from once: that is cheaper, and beam search, which swaps the caches of a sample's beams,
    relies on all of them having kept the same tokens."""
    seconds: torch.Tensor | list[torch.Tensor]
    """[V] float32, seconds between the steps of each video's temporal grid; or of each video, [T] float32, the times
    of its steps."""
    seconds_from: str
    """See ``Report.seconds_from``."""
    past_length: int
    """Slots of the cache that are filled."""
    selected: bool = False
    columns: Columns | None = None
    """None while nothing is selected, and where the prefill stays as it is."""
    dropped: Dropped | None = None
    labels: torch.Tensor | None = None
    loss_kwargs: dict[str, Any] = field(default_factory=dict)
    vision: torch.Tensor | None = None
    """What went into the projector while this call ran."""


def find_seconds(
    layout: Layout, given: list[float] | None, stated: torch.Tensor | None, default: float
) -> tuple[torch.Tensor | list[torch.Tensor], str]:
    """When the steps of the videos' temporal grids are, and who says so: ``Call.seconds`` and ``seconds_from``.

    Args:
        layout: of the prefill.
        given: seconds of a step by ``Handle.seconds_per_step``: one for all videos, or one a video.
        stated: [V] float32, seconds of a step by the inputs.
        default: seconds of a step where nobody says.

    Raises:
        ValueError: as many seconds as there are videos were expected.
    """
    number = len(layout.grids)
    if given is not None:
        if len(given) not in (1, number):
            raise ValueError(f"handle.seconds_per_step was given {len(given)} values for {number} videos")
        return torch.tensor(given, dtype=torch.float32).expand(number), "given"
    if layout.step_seconds is not None:
        return layout.step_seconds, "prompt"
    if stated is None:
        return torch.full((number,), default), "default"
    if len(stated) != number:
        raise ValueError(f"expected the seconds per grid step of {number} videos, got {len(stated)}")
    return stated, "inputs"


def video_timestamps(layout: Layout, seconds: torch.Tensor | list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """[sum M] float32: of each video token, the time of its step. ``seconds``: see ``Call.seconds``."""
    areas = [rows * columns for _, rows, columns in layout.grids]
    if isinstance(seconds, list):
        of_token = [times.repeat_interleave(area) for times, area in zip(seconds, areas, strict=True)]
        return torch.cat(of_token).to(device)
    steps = [torch.arange(grid[0]).repeat_interleave(area) for grid, area in zip(layout.grids, areas, strict=True)]
    lengths = torch.tensor(layout.lengths)
    per_token = seconds.to(device).repeat_interleave(lengths.to(device), output_size=sum(layout.lengths))
    return torch.cat(steps).to(device, torch.float32) * per_token


def pack_videos(call: Call, inputs_embeds: torch.Tensor) -> Videos:
    """The videos of ``call``, their tokens taken from ``inputs_embeds`` [B, L, D]. No question yet."""
    layout, device = call.layout, inputs_embeds.device
    return Videos(
        tokens=inputs_embeds.flatten(0, 1).index_select(0, layout.rows.to(device)),
        cu_seqlens=offsets(layout.lengths, device),
        lengths=layout.lengths,
        grids=layout.grids,
        timestamps=video_timestamps(layout, call.seconds, device),
        sample=layout.sample,
        newline_spans=layout.newline_spans,
    )


def add_question(videos: Videos, ids: list[torch.Tensor], embedding: nn.Module) -> None:
    """Give ``videos`` their questions: token ids [L] on the CPU, one a video, and their rows of the language
    model's embedding."""
    device = videos.tokens.device
    videos.question_ids = [question.to(device) for question in ids]
    weight = next(embedding.parameters(), videos.tokens)
    videos.question = embedding(torch.cat(ids).to(weight.device)).to(device)
    videos.cu_seqlens_question = offsets([len(question) for question in ids], device)


def offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    """[V+1] int32 offsets of segments of these lengths."""
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(device, torch.int32)


def shorten_decoder_inputs(
    inputs: dict[str, Any],
    call: Call,
    columns: Columns,
    tokens: torch.Tensor | None,
    past: Dropped | None,
    compact: bool,
    adapter: Adapter,
) -> tuple[dict[str, Any], Dropped]:
    """The decoder's keyword arguments with the dropped columns taken out, and what the cache must remember.

    Args:
        inputs: what the model passes to its decoder for the whole prefill.
        call: the forward call.
        columns: those that stay.
        tokens: [N, D] re-encoded rows that take the place of the kept ones, or None.
        past: what was dropped from the cache before.
        compact: give every sample consecutive positions instead of those its tokens had.
        adapter: of the model.
    """
    embeds = columns.gather_tokens(inputs["inputs_embeds"])
    if tokens is not None:
        embeds = embeds.flatten(0, 1).index_copy(0, columns.kept_rows, tokens).view_as(embeds)
    mask = _cache_mask(inputs.get("attention_mask"), call, columns, past)
    valid = call.layout.valid.repeat_interleave(call.copies, 0).to(embeds.device)
    positions = inputs.get("position_ids")
    if positions is None:  # a decoder counts by itself, from the slots of its cache
        seen = call.past_length + (past.removed if past else 0)
        positions = torch.arange(seen, seen + call.layout.columns, device=embeds.device).unsqueeze(0)
    positions, next_position, shift = _positions(positions, valid, columns, call, past, compact)

    sample = torch.arange(len(embeds), device=embeds.device)
    extras = adapter.gather_extras(inputs, sample, columns.source)
    shortened = {**inputs, **extras, "inputs_embeds": embeds, "position_ids": positions, "attention_mask": mask}
    if inputs.get("cache_position") is not None:
        shortened["cache_position"] = torch.arange(call.past_length, mask.shape[1], device=embeds.device)
    dropped = Dropped(
        seen=call.past_length + (past.removed if past else 0) + call.layout.columns,
        mask=mask.bool(),
        padded=columns.padded or call.past_length > 0,
        next_position=next_position,
        shift=shift,
    )
    return shortened, dropped


def _cache_mask(mask: torch.Tensor | None, call: Call, columns: Columns, past: Dropped | None) -> torch.Tensor:
    """[B, P + K]: the mask of the filled cache slots, then of the columns that stay. Always explicit: without
    one, gaps in the positions are taken for the borders of packed sequences."""
    new = columns.mask.to(torch.int64 if mask is None else mask.dtype)
    if call.past_length == 0:
        return new
    before = None if mask is None else mask[:, : mask.shape[1] - call.layout.columns]
    if past is not None:
        before = past.mask_2d(before, fed=call.past_length - past.kept)
    if before is None:
        before = new.new_ones(len(new), call.past_length)
    return torch.cat([before.to(new.dtype), new], dim=1)


def _positions(
    positions: torch.Tensor, valid: torch.Tensor, columns: Columns, call: Call, past: Dropped | None, compact: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The position ids of the columns that stay, each sample's next position, and the shift of later ones.

    ``positions`` is [B, L], or [3, B, L] (time, height, width), or [4, B, L] with a row of text positions
    first, which serves the detection of packed sequences alone and so stays free of gaps.
    """
    positions = positions.expand(*positions.shape[:-2], *valid.shape)
    shift = past.shift if past else None
    if shift is not None:
        positions = positions - shift.unsqueeze(1)
    rank = (columns.mask.cumsum(1) - 1).clamp(min=0)
    rotary = positions.unsqueeze(0) if positions.ndim == 2 else positions[-3:]
    next_position = rotary.masked_fill(~valid, -1).amax((0, 2)) + 1
    if compact:
        first = rotary.masked_fill(~valid, torch.iinfo(rotary.dtype).max).amin((0, 2))
        shortened = (first.unsqueeze(1) + rank).expand(*positions.shape[:-1], -1)
        gap = next_position - (first + columns.mask.sum(1))
        return shortened, next_position - gap, gap if shift is None else shift + gap
    shortened = columns.gather(positions)
    if shortened.ndim == 3 and len(shortened) == 4:
        shortened[0] = call.past_length + rank
    return shortened, next_position, shift
