"""The one protocol that every selection method speaks, and what it is given."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from qts_kernels import Selection


@dataclass
class Videos:
    """All videos of one prefill, packed: segment ``v`` is rows ``cu_seqlens[v]:cu_seqlens[v+1]``."""

    tokens: torch.Tensor
    """[sum M, D] vision embeddings after the merger, in the model's dtype."""
    cu_seqlens: torch.Tensor
    """[V+1] int32, on the device of ``tokens``."""
    lengths: list[int]
    """Tokens of each video, known on the host (so that no method needs a synchronisation)."""
    grids: list[tuple[int, int, int]]
    """(time steps, rows, columns) of each video's token grid, after the merger. Behind another method of a ``Chain``,
    the grid that its tokens were taken from; else ``lengths`` are their products."""
    timestamps: torch.Tensor
    """[sum M] float32, seconds from the start of the video."""
    sample: list[int]
    """The batch row that each video belongs to."""
    newline_spans: list[int] = field(default_factory=list)
    """Of each video, how many successive tokens share a newline token behind them, which is not in ``tokens`` and
    stays where one of them does; 0 where it has no newlines. Empty where no video has."""
    question: torch.Tensor | None = None
    """[sum L, D] embedding rows of the question text, packed, one segment a *video* (repeated where a sample
    has several). None unless the selector's ``needs_question`` is true."""
    cu_seqlens_question: torch.Tensor | None = None
    """[V+1] int32."""
    question_ids: list[torch.Tensor] = field(default_factory=list)
    """Token ids of each video's question, [L] int64."""
    context: Any = None
    """The prefill itself, for methods that run the language model: see ``qts_video.attach.Prefill``."""


@runtime_checkable
class Selector(Protocol):
    """A selection method. Stateless between calls; an ``nn.Module`` where it has parameters.

    One that sets ``needs_vision = True`` finds what went into the projector in ``videos.context.vision``. One that sets
    ``needs_grids = True`` is never given videos that lost tokens. A ``Chain`` takes either as its first method alone.
    Where one sets ``drops_empty_steps = True``, a time step that keeps no token takes all that the prompt says of it
    away: the tags around it (Qwen3-VL, InternVL), and with a tokenizer its time in a list such as LLaVA-Video's.
    ``check_tokenizer(tokenizer)``, where it has that, may refuse what ``attach`` was given: a tokenizer, a processor or
    None.
    Where one sets ``wants_unpooled = True``, ``qts ask`` gives it the frames' tokens before a model's own pooling.
    """

    name: str
    needs_question: bool

    def select(self, videos: Videos) -> Selection:
        """Choose rows of ``videos.tokens``; ``Selection.indices`` are rows of that packed axis, ascending in
        each video.

        ``Selection.tokens`` may hold re-encoded rows [N, D] that take the place of the kept rows; None keeps
        them as they are. Every video of ``videos`` must have its segment in ``Selection.cu_seqlens``.
        """
        ...


def resolve_budget(length: int, retention_ratio: float | None, max_tokens: int | None) -> int:
    """Tokens to keep of ``length``: min(max(1, ceil(retention_ratio * length)), max_tokens, length).

    Either may be None (no such bound); both None keeps everything. 0 for an empty video.
    """
    n = length
    if retention_ratio is not None:
        # The slack absorbs float rounding: 0.1 * 30 is a hair above 3, and must keep 3 tokens, not 4.
        n = math.ceil(retention_ratio * length - 1e-6)
    if max_tokens is not None:
        n = min(n, max_tokens)
    return min(max(n, 1), length)


def check_budget(retention_ratio: float | None, max_tokens: int | None) -> None:
    """Raise ValueError unless retention_ratio is in (0, 1] or None, and max_tokens is at least 1 or None."""
    if retention_ratio is not None and not 0 < retention_ratio <= 1:
        raise ValueError(f"retention_ratio must be in (0, 1], got {retention_ratio}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
