"""Methods one after another, each on what the last one kept."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from qts_kernels import Selection
from qts_video.methods.base import Selector, Videos
from qts_video.methods.budget import newline_spans


class Chain:
    """Run selection methods one after another: each is given the tokens that the last one kept, re-encoded where it did
    that, at the positions that they have, in a prompt that holds no others.

    For example ``Chain([QuoTA(...), FlexSelect(...)])``: how many tokens a frame deserves, then which of them.

    Bounds of a method behind the first are of the tokens that it is given. Of newlines, it counts only the one of a
    whole video; those of rows and frames come on top of its bounds, one for each row or frame that keeps a token.

    Args:
        methods: at least one. Behind the first, none that needs whole frames (``needs_grids``: QuoTA), nor one that
            reads the vision tower's features (``needs_vision``: FlexSelect.lite), which are not shortened.

    Raises:
        TypeError: a method that is none.
        ValueError: no method, or one that can't stand where it does.
    """

    def __init__(self, methods: Sequence[Selector]) -> None:
        self.methods = list(methods)
        if not self.methods:
            raise ValueError("a Chain needs at least one method")
        for method in self.methods:
            if isinstance(method, type) or not isinstance(method, Selector):
                raise TypeError(f"a Chain is made of selection methods, got {method!r}")
        for method in self.methods[1:]:
            if getattr(method, "needs_grids", False):
                raise ValueError(f"{method.name} needs whole frames, so it can only be the first of a Chain")
            if getattr(method, "needs_vision", False):
                raise ValueError(
                    f"{method.name} reads the vision tower's features, which are those of all tokens, so it can only "
                    "be the first of a Chain"
                )

    @property
    def name(self) -> str:
        """The names of the methods, with a + between them."""
        return "+".join(method.name for method in self.methods)

    @property
    def needs_question(self) -> bool:
        """Whether any of the methods needs it."""
        return any(method.needs_question for method in self.methods)

    @property
    def needs_vision(self) -> bool:
        """Whether the first method needs it."""
        return getattr(self.methods[0], "needs_vision", False)

    @property
    def needs_grids(self) -> bool:
        """Whether the first method needs them."""
        return getattr(self.methods[0], "needs_grids", False)

    @property
    def drops_empty_steps(self) -> bool:
        """Whether any of the methods does: then time steps are dropped behind each of them."""
        return any(getattr(method, "drops_empty_steps", False) for method in self.methods)

    def check_tokenizer(self, tokenizer: Any | None) -> None:
        """Raise what any of the methods raises."""
        for method in self.methods:
            if hasattr(method, "check_tokenizer"):
                method.check_tokenizer(tokenizer)

    @property
    def wants_unpooled(self) -> bool:
        """Whether the first method wants them so."""
        return getattr(self.methods[0], "wants_unpooled", False)

    def select(self, videos: Videos) -> Selection:
        """See ``Selector.select``. Waits for what each method but the last kept, as the prompt of the next hangs on it.

        ``scores`` are those of the last method that has some, 0 for tokens that it was not given; ``rho`` and
        ``entropy`` are the last method's; ``extras`` and ``notes`` are those of all, in order.

        Raises:
            TypeError, ValueError: of the methods, or because what one returned is no selection of what it was given.
        """
        selection = self.methods[0].select(videos)
        for before, method in pairwise(self.methods):
            following = method.select(_left(videos, selection, before.name))
            selection = _compose(selection, following, len(videos.tokens))
        return selection

    def __repr__(self) -> str:
        return f"Chain({self.methods})"


def _left(videos: Videos, selection: Selection, name: str) -> Videos:
    """What a selection leaves of ``videos``; ``grids`` stay those that the tokens were taken from."""
    context = videos.context
    if context is None:
        offsets = selection.cu_seqlens.tolist()
        counts = [end - start for start, end in pairwise(offsets)]
    else:
        context, counts = context.shortened(selection, videos, name)
    indices = selection.indices[: sum(counts)]
    tokens = selection.tokens
    whole = [0 < span == length for span, length in zip(newline_spans(videos), videos.lengths, strict=True)]
    return replace(
        videos,
        tokens=videos.tokens.index_select(0, indices) if tokens is None else tokens[: sum(counts)],
        cu_seqlens=torch.tensor([0, *accumulate(counts)]).to(videos.cu_seqlens),
        lengths=counts,
        timestamps=videos.timestamps.index_select(0, indices),
        newline_spans=[count * of_video for count, of_video in zip(counts, whole, strict=True)],
        context=context,
    )


def _compose(first: Selection, second: Selection, total: int) -> Selection:
    """``second``, a selection of what ``first`` kept, as one of the ``total`` rows that ``first`` chose from."""
    used, rows = second.indices >= 0, second.indices.clamp(min=0)
    tokens, scores = second.tokens, first.scores
    if tokens is None and first.tokens is not None:
        tokens = first.tokens.index_select(0, rows)
    if second.scores is not None:
        scored = second.scores.reshape(-1)
        scores = scored.new_zeros(total).index_copy(0, first.indices[: len(scored)], scored)
    return replace(
        second,
        indices=torch.where(used, first.indices[rows], -1),
        tokens=tokens,
        scores=scores,
        extras=(*first.extras, *second.extras),
        notes=(*first.notes, *second.notes),
    )
