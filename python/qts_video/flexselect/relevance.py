"""Semantic relevance of vision tokens: attention of the text behind a video in some layer of a language model, a set of
frames at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import nn

import qts_kernels
from qts_video.flexselect.early_exit import visit_attention
from qts_video.flexselect.sets import FrameSet, set_positions, split_frames
from qts_video.methods.base import Videos

MakeInputs = Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]
"""(sample [R] int64, columns [R, K] int64, -1 in padding), both on the model's device -> the decoder's keyword
arguments for these prompts, ``inputs_embeds`` [R, K, D] and ``position_ids`` among them, without mask and cache."""

REDUCTIONS = {
    "max": ("max", False),
    "mean": ("mean", False),
    "token_selection": ("max", False),
    "token_selection_argmax": ("max", False),
    "token_selection_mean": ("mean", False),
    "token_selection_pool": ("max", True),
}
"""Names of reductions over heads and text tokens -> that of ``qts_kernels.relevance``, and whether a sink key joins the
softmax."""
QUERIES = ("prompt", "question")


@dataclass(frozen=True)
class Scorer:
    """What scores: a language model, one of its layers, and how it is given a prompt."""

    decoder: nn.Module
    layer: int
    make_inputs: MakeInputs
    left_out: torch.Tensor | None = None
    """[B, L] bool on the CPU: columns that it can't be given."""


class LiteScorer(Protocol):
    """A selector in the place of the model's own layers."""

    def scorer(self, videos: Videos) -> Scorer:
        """What scores ``videos``, whose ``context`` is the prefill."""
        ...


def model_inputs(context: Any) -> MakeInputs:
    """Prompts for the model's own decoder. ``context``: ``qts_video.attach.Prefill``."""

    def make(sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
        return {**context.take(sample, columns), "position_ids": prompt_positions(context, sample, columns)}

    return make


def prompt_positions(context: Any, sample: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Position ids of prompts made of columns of a prefill: see ``set_positions``."""
    return set_positions(context.position_ids, sample, columns, context.adapter.positions_carry_time)


def query_columns(context: Any, query: str) -> torch.Tensor:
    """[B, L] bool on the CPU: the text whose attention is the relevance; for a video, what of it stands behind it.

    "prompt": all text, the tags around vision and of the chat template included, but not those of time steps.
    "question": the text of the last user turn.

    Raises:
        ValueError: a video without such text behind it, or a question that can't be found.
    """
    layout, config = context.layout, context.model.config
    rows = layout.rows.split(layout.lengths)
    text = torch.zeros_like(layout.valid)
    if query == "prompt":
        image = getattr(config, "image_token_id", None)  # None where images are marked as videos are
        vision = (layout.input_ids == context.adapter.video_token_id(context.model)) | (layout.input_ids == image)
        steps = torch.stack([layout.in_steps(sample) for sample in range(layout.batch)])
        text = layout.valid & ~vision & ~steps
    for video, sample in enumerate(layout.sample):
        if layout.lengths[video] == 0:  # behind another method
            continue
        if query == "question":
            text[sample, context.find_question(video)] = True
        last = int(rows[video][-1]) % layout.columns
        if bool(text[sample, last + 1 :].any()):
            continue
        if query == "question":
            raise ValueError(
                f"the question of sample {sample} stands before its video {video}, so none of its tokens sees the "
                'video: put the video first, or let all text behind it ask (query="prompt")'
            )
        raise ValueError(
            f"no text stands behind video {video} in sample {sample}: relevance is the attention of the text behind it"
        )
    return text


def score_sets(
    scorer: Scorer,
    layers: Sequence[int],
    sets: Sequence[FrameSet],
    query: torch.Tensor,
    tokens: int,
    device: torch.device,
    *,
    reduce: str = "max",
    batch_size: int | None = None,
) -> dict[int, torch.Tensor]:
    """Relevance of every video token in ``layers``.

    Every set's prompt goes through the decoder up to the last of the layers; of each, attention of the query rows over
    their causal row (all that stands before them), reduced over heads and rows.

    Args:
        scorer: the decoder and its inputs; its ``layer`` is not looked at.
        layers: which, counted from 0.
        sets: of ``split_frames``.
        query: [B, L] bool, of ``query_columns``.
        tokens: how many there are on the packed video axis.
        device: of the prompts.
        reduce: see ``REDUCTIONS``.
        batch_size: sets in one forward; None: 1 on the CPU, on a GPU what half of its free memory holds.

    Returns:
        Of each layer, [tokens] float32 (float64 from a float64 model), on ``device``. Differentiable.
    """
    if batch_size is None:
        batch_size = _fitting_sets(scorer.decoder, sets, device)
    scores: dict[int, torch.Tensor] = {}
    for start in range(0, len(sets), batch_size):
        batch = sets[start : start + batch_size]
        runs = _query_runs(batch, query)

        def visit(layer: int, q: torch.Tensor, k: torch.Tensor, scale: float, runs: "list[_Run]" = runs) -> None:
            before = scores.get(layer)
            if before is None:
                dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
                before = torch.zeros(tokens, dtype=dtype, device=device)
            scores[layer] = _add_scores(before, runs, q, k, scale, reduce)

        columns = torch.nn.utils.rnn.pad_sequence([s.columns for s in batch], batch_first=True, padding_value=-1)
        columns = columns.to(device)
        inputs = scorer.make_inputs(torch.tensor([s.sample for s in batch]).to(device), columns)
        # Ones in padding too: it is at the end, where no text sees it, and with no zero in it the mask needs no memory.
        inputs["attention_mask"] = torch.ones_like(columns)
        visit_attention(scorer.decoder, inputs, layers, visit)
    return scores


def relevance_by_layer(
    videos: Videos,
    layers: Sequence[int],
    *,
    frames_per_set: int = 64,
    reduce: str = "max",
    query: str = "prompt",
    set_batch_size: int | None = None,
) -> dict[int, torch.Tensor]:
    """What ``FlexSelect`` would score the tokens of ``videos`` with in each of ``layers``: [sum M] float32 (float64
    from a float64 model). One pass through the model, with the memory of one layer.

    Args:
        videos: with the prefill as ``context``.
        layers: of the language model, counted from 0.
        frames_per_set, reduce, query, set_batch_size: of ``FlexSelect``.

    Raises:
        ValueError: a layer that there is not, or no text behind a video.
    """
    context = videos.context
    scorer = Scorer(context.decoder, max(layers), model_inputs(context))
    sets = split_frames(context.layout, frames_per_set)
    device, tokens = context.inputs_embeds.device, sum(videos.lengths)
    text = query_columns(context, query)
    with torch.no_grad():
        return score_sets(scorer, layers, sets, text, tokens, device, reduce=reduce, batch_size=set_batch_size)


@dataclass
class _Run:
    """Successive text tokens of a set's prompt, and the videos before them."""

    prompt: int
    """Number of the prompt in its batch."""
    start: int
    stop: int
    first: int
    """Where the first token of those videos is, and one behind their last."""
    last: int
    rows: list[torch.Tensor] = field(default_factory=list)
    """Of each video, [m] int64: its tokens on the packed video axis."""
    places: list[torch.Tensor] = field(default_factory=list)
    """Of each video, [m] int64: its tokens in the prompt."""
    turn: list[int] = field(default_factory=list)
    """Of each video, how many runs of the set have scored it before."""
    share: list[float] = field(default_factory=list)
    """Of each video, the share of this run in all text tokens of the set that follow it."""


def _query_runs(batch: Sequence[FrameSet], query: torch.Tensor) -> list[_Run]:
    runs = []
    for prompt, frames in enumerate(batch):
        turns, seen = [0] * len(frames.videos), [0] * len(frames.videos)
        ends = [int(places[-1]) for places in frames.places]
        asks = query[frames.sample, frames.columns]
        of_set = []
        for start, stop in _stretches(asks):
            before = [number for number, end in enumerate(ends) if end < start]
            if not before:
                continue
            first = min(int(frames.places[number][0]) for number in before)
            run = _Run(prompt, start, stop, first, max(ends[number] for number in before) + 1)
            for number in before:
                run.rows.append(frames.rows[number])
                run.places.append(frames.places[number])
                run.turn.append(turns[number])
                turns[number] += 1
                seen[number] += stop - start
            of_set.append((run, before))
        for run, before in of_set:
            run.share = [(run.stop - run.start) / seen[number] for number in before]
            runs.append(run)
    return runs


def _stretches(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(start, stop) of every stretch of ones in ``mask`` [n] bool."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff().nonzero().squeeze(1).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _add_scores(
    scores: torch.Tensor, runs: list[_Run], q: torch.Tensor, k: torch.Tensor, scale: float, reduce: str
) -> torch.Tensor:
    """``scores`` with those of the videos in ``runs``: larger ones, or shares of a mean, are added run by run.

    Every run is a segment of its own: causal attention aligns the last query with the last key, so a run's keys end
    where it does.
    """
    reduction, sink = REDUCTIONS[reduce]
    queries = [q[run.prompt, run.start : run.stop] for run in runs]
    keys = [k[run.prompt, : run.stop] for run in runs]
    if sink:
        keys = _with_sink(runs, queries, keys)
    found = qts_kernels.relevance(
        torch.cat(queries),
        torch.cat(keys),
        reduce=reduction,
        scale=scale,
        causal=True,
        columns=[(run.first + sink, run.last + sink) for run in runs],
        cu_seqlens_q=_offsets([len(part) for part in queries], q.device),
        cu_seqlens_k=_offsets([len(part) for part in keys], k.device),
    ).to(scores.device)
    starts = [0, *accumulate(run.last - run.first for run in runs)]
    for turn in range(1 + max(max(run.turn) for run in runs)):
        targets, sources, shares = [], [], []
        for run, start in zip(runs, starts, strict=False):
            for number, at in enumerate(run.turn):
                if at == turn:
                    targets.append(run.rows[number])
                    sources.append(run.places[number] - run.first + start)
                    shares.append(torch.full((len(targets[-1]),), run.share[number], dtype=scores.dtype))
        target = torch.cat(targets).to(scores.device)
        values = found[torch.cat(sources).to(scores.device)]
        if reduction == "max":
            values = torch.maximum(scores[target], values)
        else:
            values = scores[target] + values * torch.cat(shares).to(scores.device)
        scores = scores.index_copy(0, target, values)
    return scores


def _with_sink(runs: list[_Run], queries: list[torch.Tensor], keys: list[torch.Tensor]) -> list[torch.Tensor]:
    """``keys`` with one more in front, which every text token sees: the elementwise maximum, head by head, over the
    text tokens of the set. It has a query's heads, so keys are repeated for the query heads that share them."""
    pooled: dict[int, torch.Tensor] = {}
    for run, query in zip(runs, queries, strict=True):
        largest = query.amax(0)
        pooled[run.prompt] = torch.maximum(pooled[run.prompt], largest) if run.prompt in pooled else largest
    group = queries[0].shape[1] // keys[0].shape[1]
    return [
        torch.cat([pooled[run.prompt].unsqueeze(0), key.repeat_interleave(group, 1)])
        for run, key in zip(runs, keys, strict=True)
    ]


def _offsets(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def _fitting_sets(decoder: nn.Module, sets: Sequence[FrameSet], device: torch.device) -> int:
    """Sets that go through the decoder at once: 1 on the CPU; on a GPU, what half of its free memory holds."""
    if device.type != "cuda":
        return 1
    config, longest = decoder.config, max(len(frames.columns) for frames in sets)
    # What one layer holds at a time: residual, norm, queries, keys, values, rotated copies, output; three of the
    # feed-forward's width.
    numbers = 10 * config.hidden_size + 3 * config.intermediate_size
    if config._attn_implementation == "eager":
        numbers += 3 * config.num_attention_heads * longest
    of_set = longest * numbers * next(decoder.parameters()).element_size()
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, int(free // 2 // of_set))
