"""FlexSelect: the model's own middle layers say which vision tokens its text attends to (arXiv 2506.00993)."""

import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from qts_kernels import Selection
from qts_video.flexselect.budget import best_of_segments, best_with_newlines, share
from qts_video.flexselect.defaults import default_budget, default_layer
from qts_video.flexselect.early_exit import check_layers
from qts_video.flexselect.relevance import (
    QUERIES,
    REDUCTIONS,
    LiteScorer,
    Scorer,
    model_inputs,
    query_columns,
    score_sets,
)
from qts_video.flexselect.sets import FrameSet, split_frames
from qts_video.methods.base import Videos, check_budget
from qts_video.methods.budget import count_newlines, newline_spans, resolve_budgets
from qts_video.methods.uniform import packed_selection

_CHEAP_FRAMES = 64


class FlexSelect:
    """Keep the video tokens that the text behind the video attends to most, in a middle layer of a language model.

    A sample's F time steps are split into K strided sets {k, k + K, k + 2K, ...} of at most ``frames_per_set``. Each
    set goes, with all the prompt's text and images, through layers 0 .. layer - 1 of the model itself; of ``layer``
    the rotated queries and keys alone are computed. A token's relevance is its attention weight, reduced over heads
    and the text tokens behind its video, in a softmax over all that a text token sees. The best of every set are kept,
    the sets' shares of the budget being in proportion to their tokens.

    Where a cache is filled already, only what is fed now makes the prompts of the sets.

    Args:
        layer: the reference layer, counted from 0. None: the published one of the model, where there is one.
        max_tokens: most tokens to keep of each video, newlines included. With ``retention_ratio`` None too: the
            published budget of the model, for all videos of a sample together.
        retention_ratio: share of each video's tokens to keep, newlines included, in (0, 1].
        frames_per_set: most time steps in a set, over all videos of a sample.
        reduce: over heads and text tokens, "max" or "mean". By the names of the published code: "token_selection" and
            "token_selection_argmax" are "max", "token_selection_mean" is "mean", and with "token_selection_pool" the
            softmax of "max" has one more key, the elementwise maximum of the text's queries, head by head (our reading
            of the published description).
        selector: a Lite selector, whose small language model scores in the place of the model's layers; None: the model
            itself.
        query: whose attention: "prompt", of all text behind the video, or "question", of the last user turn's text
            behind the video.
        set_batch_size: sets in one forward. None: 1 on the CPU; on a GPU, as many as half of its free memory holds.

    Raises:
        TypeError: a number that is no int.
        ValueError: a bound that is out of its range, an unknown ``reduce`` or ``query``, or a ``layer`` beside a
            ``selector``, which has its own.

    Newlines that a model puts behind the rows or frames of a video are no candidates, but those of kept rows count. A
    budget is met exactly, unless one token is left to a set whose touched rows are all kept, or which has touched none:
    a token of another row would cost two. Where a video has one newline, which always stays, at least one token does.
    """

    name = "flexselect"
    needs_question = False

    def __init__(
        self,
        layer: int | None = None,
        max_tokens: int | None = None,
        retention_ratio: float | None = None,
        frames_per_set: int = 64,
        reduce: str = "max",
        selector: LiteScorer | None = None,
        query: str = "prompt",
        set_batch_size: int | None = None,
    ) -> None:
        check_budget(retention_ratio, max_tokens)
        _check_int("layer", layer, 0, optional=True)
        _check_int("frames_per_set", frames_per_set, 1)
        _check_int("set_batch_size", set_batch_size, 1, optional=True)
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        if query not in QUERIES:
            raise ValueError(f"query must be one of {', '.join(QUERIES)}, got {query!r}")
        if selector is not None and layer is not None:
            raise ValueError(f"a Lite selector scores in its own last layer: layer must be None, got {layer}")
        self.layer = layer
        self.max_tokens = max_tokens
        self.retention_ratio = retention_ratio
        self.frames_per_set = frames_per_set
        self.reduce = reduce
        self.selector = selector
        self.query = query
        self.set_batch_size = set_batch_size
        self._warned = False

    @classmethod
    def lite(
        cls,
        path_or_id: str | Path,
        max_tokens: int | None = None,
        retention_ratio: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "FlexSelect":
        """FlexSelect-Lite: a small language model of its own scores in the place of the model's layers.

        It must be on the device and in the dtype of the model's vision features.

        Args:
            path_or_id: what ``LiteSelector.save_pretrained`` wrote, or a released Lite checkpoint; a folder, or an id
                on the hub.
            max_tokens, retention_ratio: as above.
            device, dtype: where to put it: the model's. None: the CPU, and the dtype it was saved in.
            options: the other arguments of ``FlexSelect``, without ``layer`` and ``selector``.

        Raises:
            FileNotFoundError, ValueError, RuntimeError: see ``LiteSelector.from_pretrained``.
        """
        from qts_video.lite import LiteSelector

        selector = LiteSelector.from_pretrained(path_or_id).to(device, dtype)
        return cls(max_tokens=max_tokens, retention_ratio=retention_ratio, selector=selector, **options)

    @property
    def needs_vision(self) -> bool:
        """Whether ``videos.context.vision`` must hold the input of the model's projector."""
        return self.selector is not None

    @torch.no_grad()
    def select(self, videos: Videos) -> Selection:
        """See ``Selector.select``. Scores are float32; tokens are not re-encoded.

        Raises:
            ValueError: there is no prefill in ``videos.context``; no layer or budget is known for the model; the layer
                is out of range or has sliding-window attention; a video has no text, or not the question, behind it;
                or more videos than ``frames_per_set`` are in a sample.
        """
        context = videos.context
        if context is None:
            raise ValueError("FlexSelect finds text in the prompt, and videos.context is None: use it with attach()")
        scorer = self._scorer(videos)
        check_layers(scorer.decoder, [scorer.layer])
        budgets = self._budgets(videos)
        query = query_columns(context, self.query)
        sets = split_frames(context.layout, self.frames_per_set, scorer.left_out)
        if self.selector is None:
            self._warn_of_cost(videos)
        scores = score_sets(
            scorer,
            [scorer.layer],
            sets,
            query,
            len(videos.tokens),
            videos.tokens.device,
            reduce=self.reduce,
            batch_size=self.set_batch_size,
        )[scorer.layer].float()
        return _select(videos, sets, budgets, scores)

    def _scorer(self, videos: Videos) -> Scorer:
        if self.selector is not None:
            return self.selector.scorer(videos)
        context = videos.context
        decoder = context.decoder
        layer = default_layer(context.model, decoder) if self.layer is None else self.layer
        return Scorer(decoder, layer, model_inputs(context))

    def _budgets(self, videos: Videos) -> list[int]:
        """Tokens to keep of each video, newlines included."""
        if self.max_tokens is not None or self.retention_ratio is not None:
            return resolve_budgets(videos, self.retention_ratio, self.max_tokens)
        budget = default_budget(videos.context.model, videos.context.decoder)
        totals = [length + count for length, count in zip(videos.lengths, count_newlines(videos), strict=True)]
        budgets = [0] * len(totals)
        for sample in set(videos.sample):
            of_sample = [video for video, of in enumerate(videos.sample) if of == sample]
            for video, part in zip(of_sample, share(budget, [totals[video] for video in of_sample]), strict=True):
                budgets[video] = part
        return budgets

    def _warn_of_cost(self, videos: Videos) -> None:
        frames = [0] * (max(videos.sample) + 1)
        for sample, (steps, _, _) in zip(videos.sample, videos.grids, strict=True):
            frames[sample] += steps
        if max(frames) <= _CHEAP_FRAMES and not self._warned:
            self._warned = True
            warnings.warn(
                f"training-free FlexSelect on {max(frames)} frames: at {_CHEAP_FRAMES} and below, running the model's "
                "layers to select costs more than it saves; a Lite selector does not",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        options = ("layer", "max_tokens", "retention_ratio", "frames_per_set", "reduce", "query")
        return f"FlexSelect({', '.join(f'{name}={getattr(self, name)!r}' for name in options)})"


def _select(videos: Videos, sets: list[FrameSet], budgets: list[int], scores: torch.Tensor) -> Selection:
    """The best tokens of every set, shared out by ``budgets``, as one selection."""
    starts = [0, *accumulate(videos.lengths)]
    spans = newline_spans(videos)
    whole = [span == length for span, length in zip(spans, videos.lengths, strict=True)]
    # The newline of a whole video always stays: it is paid for first.
    budgets = [max(budget - paid, min(budget, 1)) for budget, paid in zip(budgets, whole, strict=True)]
    segments, lines, sizes = [], [], [[] for _ in budgets]
    of_video = [(video, rows) for frames in sets for video, rows in zip(frames.videos, frames.rows, strict=True)]
    for video, rows in of_video:
        span = 0 if whole[video] else spans[video]
        segments.append(rows)
        lines.append(rows - (rows - starts[video]) % span if span else None)
        sizes[video].append(len(rows) + (len(rows) // span if span else 0))
    shares = [iter(share(budget, of)) for budget, of in zip(budgets, sizes, strict=True)]
    counts = [next(shares[video]) for video, _ in of_video]

    if all(line is None for line in lines):
        selection = packed_selection(best_of_segments(scores, segments, counts), budgets, scores.device)
        selection.scores = scores
        return selection
    indices, cu_seqlens = best_with_newlines(scores, segments, lines, counts, videos.cu_seqlens, max(budgets))
    return Selection(indices=indices, cu_seqlens=cu_seqlens, scores=scores, n=cu_seqlens.diff().long())


def _check_int(name: str, value: Any, least: int, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
